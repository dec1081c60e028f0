"""Patterns one by one: what each sees, how they are joined, and the masks and outputs of the original codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from chapters.attention import patterns
from chapters.shared.block_masks import BlockMask
from tests.attention.masks import SIZES, dense_mask
from tests.conftest import golden, tolerance

CAUSAL = patterns.causal()
EXACT = {"rtol": 0, "atol": 1e-10}  # both in float64


def by_loop(T: int, S: int, sees) -> np.ndarray:
    """The definition: sees(i, j) for every pair of positions, aligned at the bottom right."""
    return np.array([[bool(sees(row + S - T, j)) for j in range(S)] for row in range(T)])


@given(SIZES, SIZES, st.integers(1, 9), st.integers(0, 2), st.integers(0, 2))
def test_blockwise_strided_and_summaries(T, S, size, back, forward):
    np.testing.assert_array_equal(CAUSAL.dense(T, S), by_loop(T, S, lambda i, j: j <= i))
    own = by_loop(T, S, lambda i, j: -back <= j // size - i // size <= forward)
    np.testing.assert_array_equal(patterns.blockwise(size, back, forward).dense(T, S), own)
    np.testing.assert_array_equal(patterns.strided(size).dense(T, S), by_loop(T, S, lambda i, j: (i - j) % size == 0))
    for width, shift in ((1, 0), (size, 0), (1, size - 1)):
        last = [size - 1 - shift * width - n for n in range(width)]
        expected = by_loop(T, S, lambda i, j, last=last: j % size in last)
        np.testing.assert_array_equal(patterns.summaries(size, width, shift).dense(T, S), expected)


@given(SIZES, SIZES, st.integers(1, 9), st.integers(0, 2**31))
def test_global_tokens_and_layouts(T, S, size, seed):
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, S, size=3)
    expected = by_loop(T, S, lambda i, j: i in chosen or j in chosen)
    np.testing.assert_array_equal(patterns.global_tokens(chosen).dense(T, S), expected)
    grid = generator.random((3, 4)) < 0.5
    expected = by_loop(T, S, lambda i, j: 0 <= i // size < 3 and j // size < 4 and grid[i // size, j // size])
    np.testing.assert_array_equal(patterns.layout(size, grid).dense(T, S), expected)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 5))
def test_patterns_are_joined_cut_and_reordered(n, size, stride):
    one, other = patterns.window(size), patterns.strided(stride)
    np.testing.assert_array_equal((one | other).dense(n), one.dense(n) | other.dense(n))
    np.testing.assert_array_equal((one & other).dense(n), one.dense(n) & other.dense(n))
    order = patterns.stride_order(n, stride)
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(other.reordered(order).dense(n), other.dense(n)[np.ix_(order, order)])


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 20), st.booleans(), st.tuples(SIZES, SIZES))
def test_every_method_sees_itself_and_when_causal_no_future(n, size, block, past_only, blocks):
    for name, pattern in patterns.methods(n, size, block, 0, past_only).items():
        dense = pattern.dense(n)
        assert dense.diagonal().all(), name
        assert not (past_only and np.triu(dense, 1).any()), name
        np.testing.assert_array_equal(patterns.block_mask(pattern, n, n, *blocks).dense()[0], dense)


def test_bigbird_is_neighbours_ends_and_random_blocks():
    grid = patterns.bigbird(10, 1, count=2, seed=3).dense(10)
    near = np.abs(np.arange(10)[:, None] - np.arange(10)) <= 1
    assert grid[[0, -1]].all() and grid[:, [0, -1]].all() and grid[near].all()
    near[[0, -1]] = near[:, [0, -1]] = True
    assert (grid & ~near).sum(axis=1).tolist() == [0, *[2] * 8, 0]
    past = (patterns.bigbird(10, 1, count=2, seed=3, past_only=True) & CAUSAL).dense(10)
    assert past.sum(axis=1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]
    longer = (patterns.bigbird(40, 1, count=2, seed=3, past_only=True) & CAUSAL).dense(40)
    np.testing.assert_array_equal(longer[:10, :10], past)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: patterns.window(0), "size must be at least 1, got 0"),
        (lambda: patterns.window(4, 0), "dilation must be at least 1, got 0"),
        (lambda: patterns.blockwise(-1), "size must be at least 1, got -1"),
        (lambda: patterns.blockwise(4, back=-1), "back must be at least 0, got -1"),
        (lambda: patterns.strided(0), "stride must be at least 1, got 0"),
        (lambda: patterns.summaries(4, 5), "1 times width 5 must fit into length 4"),
        (lambda: patterns.summaries(4, 2, 2), "3 times width 2 must fit into length 4"),
        (lambda: patterns.global_tokens([3, -1]), "position must be at least 0, got -1"),
        (lambda: patterns.layout(4, np.zeros((2, 2))), "grid must be a bool matrix"),
        (lambda: patterns.random_blocks(np.zeros(3, bool), 1), "taken must be a bool matrix"),
        (lambda: patterns.block_mask(CAUSAL, 4, 4, 0, 4), "block_q must be at least 1, got 0"),
        (lambda: patterns.block_mask(CAUSAL, 0, 4), "T must be at least 1, got 0"),
        (lambda: patterns.block_mask(np.ones((3, 4), bool), 4, 4), r"must be \[4, 4\], got \(3, 4\)"),
        (lambda: patterns.block_mask([], 4, 4), "at least one mask"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_other_types_are_refused_in_words():
    with pytest.raises(TypeError, match="interpreted as an integer"):
        patterns.window(2.5)
    with pytest.raises(TypeError, match=r"a Pattern or a bool array, got float64"):
        patterns.block_mask(np.ones((4, 4)), 4, 4)


@pytest.mark.parametrize(("T", "S"), [(24, 24), (20, 33), (33, 20)])
def test_lists_are_flex_attention_s(T, S):
    dense = dense_mask("blocks", 1, T, S) | dense_mask("few", 2, T, S)
    mask, tensor = patterns.block_mask(dense, T, S, 8, 8), torch.from_numpy(dense)
    theirs = create_block_mask(lambda b, h, i, j: tensor[i, j], None, None, T, S, "cpu", BLOCK_SIZE=8)
    for grid, counts, indices in [
        (mask.partial, theirs.kv_num_blocks, theirs.kv_indices),
        (mask.full, theirs.full_kv_num_blocks, theirs.full_kv_indices),
    ]:
        for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            assert np.flatnonzero(grid[0, row]).tolist() == columns[: int(count)].tolist()


# --- the original codes -------------------------------------------------------------------------------------------


def split(x: np.ndarray, heads: int) -> np.ndarray:
    """[B, N, E] -> [B, heads, N, E / heads], float64."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2).astype(np.float64)


def joined(x: np.ndarray) -> np.ndarray:
    """The inverse of `split`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def projected(arrays: dict, case: str, name: str, heads: int) -> np.ndarray:
    """A linear layer of a golden case, by heads."""
    weight, bias = (arrays[f"{case}/w/{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
    return split(arrays[f"{case}/x"].astype(np.float64) @ weight.T + bias, heads)


FIXED = patterns.blockwise(16)
OPENAI = {
    "all": (16, [CAUSAL]),
    "local": (24, [patterns.window(8) & CAUSAL]),
    "strided": (32, [(patterns.strided(4) & CAUSAL).reordered(patterns.stride_order(32, 4))]),
    "fixed_v1": (32, [(FIXED | patterns.summaries(16, 4)) & CAUSAL] * 2),
    "fixed_v4": (48, [(FIXED | patterns.summaries(16, 4, head)) & CAUSAL for head in range(4)]),
    "fixed_v2c2": (64, [(FIXED | patterns.summaries(16, 8, head % 2)) & CAUSAL for head in range(4)]),
}


@pytest.mark.parametrize("name", OPENAI)
def test_blocks_of_sparse_transformer(name):
    arrays, (n, masks) = golden("attn/sparse_openai_patterns"), OPENAI[name]
    mask = patterns.block_mask(masks, n, n, 4, 4)
    np.testing.assert_array_equal(mask.dense(), arrays[f"block/{name}/mask"])
    layout = arrays[f"block/{name}/layout"]
    np.testing.assert_array_equal(mask.partial | mask.full, np.broadcast_to(layout, mask.full.shape))
    if name == "strided":
        np.testing.assert_array_equal(patterns.stride_order(32, 4), arrays["block/strided/order"])


@pytest.mark.parametrize(
    ("name", "pattern"), [("all", CAUSAL), ("local", patterns.window(4)), ("strided", patterns.strided(4))]
)
def test_attention_of_sparse_transformer(name, pattern):
    arrays = golden("attn/sparse_openai_patterns")
    q, k, v = (split(arrays[f"attn/{name}/{x}"], 3) for x in "qkv")
    out, _ = patterns.block_sparse_attention(q, k, v, patterns.block_mask(pattern & CAUSAL, 16, 16, 4, 4))
    np.testing.assert_allclose(joined(out), arrays[f"attn/{name}/out"], **EXACT)


def test_bigbird_s_blocks_and_attention():
    arrays, case = golden("attn/sparse_bigbird"), "s32_b4_r1"
    near = (patterns.blockwise(1, 1, 1) | patterns.global_tokens([0, 7])).dense(8)
    masks = []
    for head in range(2):
        grid = near.copy()
        np.put_along_axis(grid[1:-1], arrays[f"{case}/rand_attn"][head].astype(int), True, axis=1)
        assert (grid & ~near)[1:-1].sum(axis=1).tolist() == [1] * 6, "theirs are new, too"
        masks.append(patterns.layout(4, grid))
    np.testing.assert_array_equal(patterns.block_mask(masks, 32, 32, 4, 4).dense(), arrays[f"{case}/mask"])
    q, k, v = (projected(arrays, case, name, 2) for name in ("query", "key", "value"))
    for batch, real in enumerate(arrays[f"{case}/pad_mask"] > 0):
        mask = patterns.block_mask([x.dense(32) & real for x in masks], 32, 32, 4, 4)
        own = slice(batch, batch + 1)
        out, _ = patterns.block_sparse_attention(q[own], k[own], v[own], mask)
        np.testing.assert_allclose(joined(out)[0] * real[:, None], arrays[f"{case}/out"][batch], **EXACT)


def test_longformer_s_windows():
    for name, invalid in golden("attn/sparse_longformer").items():
        if name.startswith("invalid_autoregressive/"):
            w, dilation, n = (int(part[1:]) for part in name.split("/")[1].split("_"))
            key = np.arange(n)[:, None] + dilation * (np.arange(w + 1) - w)  # theirs is stored by diagonals
            expected = np.zeros((n, n), dtype=bool)
            expected[np.nonzero(~invalid)[0], key[~invalid]] = True
            np.testing.assert_array_equal((patterns.window(w + 1, dilation) & CAUSAL).dense(n), expected)


def by_mask(q: np.ndarray, k: np.ndarray, v: np.ndarray, dense: np.ndarray) -> np.ndarray:
    return patterns.block_sparse_attention(q, k, v, patterns.block_mask(dense, *dense.shape, 4, 4))[0]


def test_longformer_s_attention_with_global_tokens_and_padding():
    arrays = golden("attn/sparse_longformer")
    q, k, v = (projected(arrays, "self", name, 3) for name in ("query", "key", "value"))
    wide = [projected(arrays, "self", f"{name}_global", 3) for name in ("query", "key", "value")]
    close = tolerance(np.float32)  # the original drops to float32 in its softmax
    for batch, kind in enumerate(arrays["self/attention_mask"]):
        real, chosen, own = kind >= 0, np.flatnonzero(kind > 0), slice(batch, batch + 1)
        near = patterns.window(int(arrays["self/w_one_sided"]) + 1) | patterns.global_tokens(chosen)
        out = by_mask(q[own], k[own], v[own], near.dense(24) & real)
        every = by_mask(*(x[own] for x in wide), np.tile(real, (24, 1)))
        out[:, :, chosen] = every[:, :, chosen]  # global tokens have projections of their own for their own rows
        np.testing.assert_allclose(joined(out)[0][real], arrays["self/out"][batch][real], **close)
    np.testing.assert_allclose(
        joined(by_mask(q, k, v, patterns.window(4).dense(24))), arrays["self/out_no_global_no_pad"], **close
    )


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("causal_block", patterns.blockwise(4, back=1) & CAUSAL), ("own_block_only", patterns.blockwise(4))],
)
def test_local_attention_s_blocks(name, pattern):
    arrays = golden("attn/local_attention")
    np.testing.assert_array_equal(pattern.dense(16), arrays[f"{name}/mask"])
    q, k, v = (arrays[f"{name}/{x}"].astype(np.float64)[:, None] for x in "qkv")
    np.testing.assert_allclose(by_mask(q, k, v, pattern.dense(16))[:, 0], arrays[f"{name}/out"], **EXACT)


def test_a_mask_by_hand():
    full = np.array([[[True, False]]])
    tokens = np.array([[[True, False], [False, False]]])
    mask = BlockMask((2, 3), 2, 2, ~full, full, tokens)
    np.testing.assert_array_equal(mask.dense()[0], [[True, True, True], [True, True, False]])
