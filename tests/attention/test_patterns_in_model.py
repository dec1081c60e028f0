"""Sparse patterns in torch and in the model: gradients, dead rows, cached decoding, costs, backward kernels."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import patterns
from chapters.shared.block_masks import Pattern
from chapters.shared.pattern_measures import costs, layers_needed
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.model import Transformer
from tests.attention.checks import assert_close, assert_kernel_close
from tests.attention.masks import as_pattern, definition, dense_mask, masked, masked_problems
from tests.attention.on_device import DTYPES, PLACES, few_examples, on_device
from tests.attention.problems import HEADS, LENGTHS
from tests.conftest import DEVICE, kernel, tolerance

fast = kernel("attention.patterns")
if fast is not None:
    from kernels.shared import block_cases, block_lists

BLOCKS = st.tuples(st.integers(1, 20), st.integers(1, 20))
CASES = masked_problems(LENGTHS, st.integers(1, 8))


def by_torch(case, dout: np.ndarray) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """out and gradients by torch's operator with a dense mask, 0 where a query sees nothing."""
    tensors = [torch.from_numpy(x).requires_grad_() for x in (case.problem.q, case.problem.k, case.problem.v)]
    seen = torch.from_numpy(case.seen.copy())
    empty = ~seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(*tensors, attn_mask=seen | empty, enable_gqa=True).masked_fill(empty, 0)
    return out.detach(), list(torch.autograd.grad((out * torch.from_numpy(dout)).sum(), tensors))


@given(CASES, BLOCKS)
def test_torch_gives_attention_with_the_mask_and_its_gradients(case, blocks):
    mask = patterns.block_mask(list(case.masks), *case.masks[0].shape, *blocks)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (case.problem.q, case.problem.k, case.problem.v)]
    out = patterns.sparse_attention(*tensors, mask)
    gradients = torch.autograd.grad(out, tensors, torch.from_numpy(case.problem.dout))
    expected = by_torch(case, case.problem.dout)
    assert_close(out.detach(), expected[0], case.problem)
    for gradient, truth in zip(gradients, expected[1], strict=True):
        assert_close(gradient, truth, case.problem)


@given(CASES, BLOCKS)
def test_the_reference_gives_attention_with_the_mask(case, blocks):
    arrays = (case.problem.q, case.problem.k, case.problem.v)
    mask = patterns.block_mask(list(case.masks), *case.masks[0].shape, *blocks)
    for found, truth in zip(
        patterns.block_sparse_attention(*arrays, mask), definition(*arrays, case.seen), strict=True
    ):
        assert_close(found, truth, case.problem)


def test_rows_without_keys_give_zeros_and_finite_gradients():
    case = masked("nothing", 0, HEADS[4], 9, 7, 4, each=False, data="normal")
    mask = patterns.block_mask(case.masks, 9, 7, 4, 4)
    out, lse = patterns.block_sparse_attention(case.problem.q, case.problem.k, case.problem.v, mask)
    assert not out.any() and np.isneginf(lse).all()
    tensors = [torch.from_numpy(x).requires_grad_() for x in (case.problem.q, case.problem.k, case.problem.v)]
    result = patterns.sparse_attention(*tensors, mask)
    assert not result.any()
    assert not any(x.any() for x in torch.autograd.grad(result.square().sum() + result.sum(), tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = patterns.block_mask(patterns.window(9) & patterns.causal(), 40, 40, 16, 16)
    out = patterns.sparse_attention(x, x, x, mask)
    assert out.dtype == dtype
    exact = patterns.block_sparse_attention(*[x.double().numpy()] * 3, mask)[0]
    np.testing.assert_allclose(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


CONFIG = Config(vocab_size=32, dim=48, hidden_dim=32, layers=2, heads=6, kv_heads=2, context=200)


def model_with(attend=None) -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG, **({"attend": attend} if attend else {})).double().eval()


@torch.no_grad()
def test_a_window_over_everything_is_the_plain_model():
    tokens = torch.randint(0, 32, (2, 70), generator=torch.Generator().manual_seed(0))
    ours = model_with(patterns.sparse_attend(patterns.window(70), 16))(tokens)
    torch.testing.assert_close(ours, model_with()(tokens), **tolerance(torch.float64, 70, scale=10))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bigbird", "longformer", "fixed", "strided"])
def test_cached_decoding_sees_what_the_whole_text_saw(name):
    tokens = torch.randint(0, 32, (2, 70), generator=torch.Generator().manual_seed(1))
    model = model_with(patterns.sparse_attend(patterns.methods(512, 16, 8)[name], 16))
    whole, cache = model(tokens), KVCache(CONFIG, batch=2, dtype=torch.float64)
    parts = [model(part, cache) for part in tokens.split([50, 1, 17, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **tolerance(torch.float64, 70, scale=10))


def test_the_model_runs_with_every_pattern_and_refuses_windows_of_nothing():
    parser = argparse.ArgumentParser()
    patterns.options(parser)
    parser.set_defaults(seed=0)
    x = torch.randn(1, 2, 20, 4)
    for name in patterns.methods(20, 8, 8):
        args = parser.parse_args(["--pattern", name, "--window", "8", "--block", "8"])
        assert patterns.seams(args)["attend"](x, x, x).isfinite().all()
    for option in ("--window", "--block"):
        with pytest.raises(ValueError, match=f"{option[2:]} must be at least 1, got 0"):
            patterns.seams(parser.parse_args([option, "0"]))


def test_costs_count_pairs_and_blocks():
    mask = patterns.block_mask(patterns.causal(), 64, 64, 16, 16)
    found = costs(mask, head_size=8)
    assert (found["pairs"], found["blocks"], found["operations"]) == (64 * 65 / 2, 10, 4 * 8 * 256 * 10)
    assert found["share of blocks"] == 10 / 16
    both = patterns.block_mask([patterns.causal(), patterns.window(1)], 64, 64, 16, 16)
    assert costs(both)["pairs"] == (64 * 65 / 2 + 64) / 2, "the mean of the heads"


def test_live_blocks_grow_like_the_length_and_full_ones_like_its_square():
    def blocks(name, n):
        pattern = patterns.methods(n, 64, 32)[name]
        return costs(patterns.block_mask(pattern, n, n, 32, 32))["blocks"]

    for name in ("blockwise", "local", "longformer", "bigbird"):
        assert blocks(name, 2048) < 2.1 * blocks(name, 1024)
    assert blocks("full", 2048) > 3.8 * blocks("full", 1024)


def test_layers_until_everything_is_reached():
    n, past = 64, patterns.causal()
    need = {name: layers_needed(pattern.dense(n)) for name, pattern in patterns.methods(n, 8, 8).items()}
    assert need["full"] == 1 and need["strided"] == need["fixed"] == need["bigbird"] == 2
    assert need["local"] == 9, "63 positions, 7 a layer"
    assert need["blockwise"] == need["dilated"] == np.inf
    every = np.ones((n, n), dtype=bool)
    assert layers_needed((patterns.window(2) | patterns.global_tokens([5])).dense(n), every) == 2
    assert layers_needed((patterns.window(2) & past).dense(n), every) == np.inf


def test_masks_that_do_not_fit_are_refused_in_words():
    x = np.zeros((1, 4, 8, 4))
    for shape, count in (((8, 9), 1), ((9, 8), 1), ((8, 8), 2)):
        mask = patterns.block_mask([np.ones(shape, bool)] * count, *shape, 4, 4)
        for way, array in ((patterns.block_sparse_attention, x), (patterns.sparse_attention, torch.from_numpy(x))):
            with pytest.raises(ValueError, match=r"mask must be for \(8, 8\) queries and keys and one head or 4"):
                way(array, array, array, mask)
    mask = patterns.block_mask(patterns.causal(), 8, 8, 4, 4)
    with pytest.raises(TypeError, match="float32, float64; got int64"):
        patterns.block_sparse_attention(*[x.astype(int)] * 3, mask)
    with pytest.raises(ValueError, match="scale must be"):
        patterns.block_sparse_attention(x, x, x, mask, scale=0.0)


# --- the kernels --------------------------------------------------------------------------------------------------

MASK_BLOCKS = st.tuples(st.sampled_from((16, 32)), st.sampled_from((16, 32)))
SMALL = masked_problems(
    st.sampled_from((1, 17, 33)) | st.integers(1, 34), st.sampled_from((1, 16, 24)), heads=HEADS[:5]
)


@pytest.mark.kernel
@settings(few_examples, max_examples=5)
@given(SMALL, MASK_BLOCKS, DTYPES, PLACES)
def test_backward_kernels_give_the_gradients_of_torch(case, blocks, dtype, places):
    arrays = (case.problem.q, case.problem.k, case.problem.v)
    mask = patterns.block_mask(list(case.masks), *case.masks[0].shape, *blocks)
    forward = definition(*arrays, case.seen)
    given_ = map(on_device, (case.problem.dout, *arrays, forward[0]), [dtype] * 5, places)
    lse = on_device(forward[1], torch.float32)
    found = fast.block_sparse_attention_backward(*given_, lse, block_lists.on_device(mask, DEVICE))
    for gradient, truth in zip(found, by_torch(case, case.problem.dout)[1], strict=True):
        assert gradient.dtype == dtype
        assert_kernel_close(gradient, truth.numpy(), case.problem)


@pytest.mark.kernel
def test_the_kernel_under_autograd():
    case = masked("blocks", 5, (1, 1, 2), 40, 50, 16, each=True, data="normal")
    mask = block_lists.on_device(patterns.block_mask(case.masks, 40, 50, 16, 32), DEVICE)
    tensors = [on_device(x, torch.float32).requires_grad_() for x in (case.problem.q, case.problem.k, case.problem.v)]
    out, lse = fast.block_sparse_attention(*tensors, mask)
    assert not lse.requires_grad
    for gradient, truth in zip(
        torch.autograd.grad(out.sum(), tensors), by_torch(case, np.ones_like(case.problem.q))[1], strict=True
    ):
        assert_kernel_close(gradient, truth.numpy(), case.problem)


@pytest.mark.kernel
@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 100), st.integers(1, 100), MASK_BLOCKS, st.integers(1, 3))
def test_lists_hold_the_mask_both_ways(seed, T, S, blocks, heads):
    masks = [dense_mask("blocks", seed + head, T, S) for head in range(heads)]
    found = block_lists.on_device(patterns.block_mask(masks, T, S, *blocks), "cpu")
    assert found.shape == (T, S) and found.size == blocks
    for lists, size, way in ((found.rows, blocks, masks), (found.columns, blocks[::-1], [x.T for x in masks])):
        assert lists.table.is_contiguous() and lists.indices.is_contiguous() and lists.bits.is_contiguous()
        bits = (lists.bits[..., None] >> torch.arange(8) & 1).flatten(-2).bool().numpy()
        for head, dense in enumerate(way):
            held = np.zeros([x * y for x, y in zip(lists.indices.shape[1:], size, strict=True)], dtype=bool)
            for row, several, live, slot in lists.table[head].tolist():
                for place, column in enumerate(lists.indices[head, row, :live].tolist()):
                    at = np.s_[row * size[0] : (row + 1) * size[0], column * size[1] : (column + 1) * size[1]]
                    held[at] = bits[slot + place] if place < several else True
            np.testing.assert_array_equal(held[: dense.shape[0], : dense.shape[1]], dense)
            assert not held[dense.shape[0] :].any() and not held[:, dense.shape[1] :].any()
        assert (lists.table[..., 2].sum(0).diff() <= 0).all(), "rows with most live blocks first"


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("length", "window", "sinks"), [(64, 16, 16), (65, 200, 0), (50, 1, 0), (96, 32, 16), (70, 20, 5)]
)
def test_the_band_of_the_cases_is_the_dense_one(length, window, sinks):
    i = torch.arange(length)
    dense = block_cases.band(i[:, None], i, window, sinks)
    expected = patterns.window(window) | Pattern(lambda i, j: j < sinks)
    np.testing.assert_array_equal(dense, (expected & patterns.causal()).dense(length))
    assert int(dense.sum()) == block_cases.seen_pairs(length, window, sinks)
    ours = block_cases.band_mask(length, window, sinks, 16, torch.device("cpu"))
    theirs = block_lists.on_device(patterns.block_mask(dense.numpy(), length, length, 16, 16), "cpu")
    if (length, window, sinks) != (70, 20, 5):  # there window and sinks fill a block together, which counts as partial
        for mine, truth in zip((*ours.rows, *ours.columns), (*theirs.rows, *theirs.columns), strict=True):
            assert torch.equal(mine, truth)
    assert ours.rows.table[..., 2].sum() == theirs.rows.table[..., 2].sum()


@pytest.mark.kernel
def test_kernels_refuse_what_does_not_fit():
    x = torch.zeros(1, 4, 32, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"block_q must be one of .* got 24"):
        block_lists.on_device(patterns.block_mask(patterns.causal(), 48, 48, 24, 16), DEVICE)
    for T, S, count in ((32, 33, 1), (32, 32, 3)):
        mask = block_lists.on_device(
            patterns.block_mask([as_pattern(np.ones((T, S), bool))] * count, T, S, 16, 16), DEVICE
        )
        with pytest.raises(ValueError, match=r"mask must be for \(32, 32\)"):
            fast.block_sparse_attention(x, x, x, mask)
    mask = block_lists.on_device(patterns.block_mask(patterns.causal(), 32, 32, 16, 16), DEVICE)
    with pytest.raises(TypeError, match="q must have dtype"):
        fast.block_sparse_attention(x.double(), x.double(), x.double(), mask)
    lse = torch.zeros(1, 4, 32, device=DEVICE)
    for wrong in ((x[:, :2], x, lse), (x, x[:, :2], lse), (x, x, lse[:, :2])):
        with pytest.raises(ValueError, match="dout, out and lse must fit q"):
            fast.block_sparse_attention_backward(wrong[0], x, x, x, *wrong[1:], mask)


@pytest.mark.kernel
@pytest.mark.parametrize("field", ["partial", "full", "tokens"])
def test_grids_that_do_not_fit_are_refused(field):
    mask = patterns.block_mask(patterns.causal(), 48, 48, 16, 16)
    fields = {name: getattr(mask, name) for name in ("shape", "block_q", "block_k", "partial", "full", "tokens")}
    with pytest.raises(ValueError, match=f"{field} must be"):
        block_lists.on_device(argparse.Namespace(**fields | {field: fields[field][:, :2]}), DEVICE)
    with pytest.raises(TypeError, match=field):
        block_lists.on_device(argparse.Namespace(**fields | {field: fields[field].astype(int)}), DEVICE)
