"""Sparse patterns: masks against their definitions and torch's, attention over live blocks, and the kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import patterns
from chapters.shared.block_masks import Pattern
from tests.attention.checks import assert_close, assert_float32_close, assert_kernel_close, untouched
from tests.attention.masks import SIZES, as_pattern, block_of, definition, dense_mask, masked, masked_problems
from tests.attention.on_device import DTYPES, PLACES, Place, at_the_wall, few_examples, on_device
from tests.attention.problems import FAR_BELOW, HEADS, LENGTHS
from tests.conftest import DEVICE, kernel, oracle, tolerance

WINDOW = pytest.mark.exercise("chapters.attention.patterns.window", points=1)
RANDOM = pytest.mark.exercise("chapters.attention.patterns.random_blocks", points=2)
MASK = pytest.mark.exercise("chapters.attention.patterns.block_mask", points=3)
ROW = pytest.mark.exercise("chapters.attention.patterns.attend_row", points=3)
KERNEL = pytest.mark.exercise("kernels.attention.patterns.attend_blocks", points=4)

fast, book = kernel("attention.patterns"), oracle("attention.patterns")
if fast is not None:
    from kernels.shared import block_lists


@WINDOW
@given(st.integers(1, 12), st.integers(1, 5), SIZES, SIZES)
def test_a_window_is_a_list_of_offsets(size, dilation, T, S):
    seen = patterns.window(size, dilation).dense(T, S)
    expected = np.zeros((T, S), dtype=bool)
    for row in range(T):
        for step in range(1 - size, size):
            key = row + S - T + step * dilation
            if 0 <= key < S:
                expected[row, key] = True
    np.testing.assert_array_equal(seen, expected)


@WINDOW
def test_a_window_is_dilated_only_where_asked():
    offset = np.arange(12) - np.arange(12)[:, None]
    np.testing.assert_array_equal(patterns.window(3).dense(12), abs(offset) < 3)


@WINDOW
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0,), ValueError),
        ((-3,), ValueError),
        ((4, 0), ValueError),
        ((4, -1), ValueError),
        ((2.5,), TypeError),
        ((4, 1.5), TypeError),
    ],
)
def test_windows_that_hold_nothing_are_refused(arguments, error):
    with pytest.raises(error):
        patterns.window(*arguments)


@RANDOM
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 6), st.integers(0, 2**31), st.floats(0, 1))
def test_random_blocks_are_new_and_as_many_as_asked_for(rows, columns, count, seed, density):
    taken = np.random.default_rng(seed).random((rows, columns)) < density
    drawn = untouched(patterns.random_blocks, taken, count=count, seed=seed)
    assert drawn.dtype == bool and drawn.shape == taken.shape
    assert not (drawn & taken).any()
    np.testing.assert_array_equal(drawn.sum(axis=1), np.minimum(count, (~taken).sum(axis=1)))
    np.testing.assert_array_equal(drawn, patterns.random_blocks(taken, count, seed))
    half = rows // 2 + 1
    np.testing.assert_array_equal(drawn[:half], patterns.random_blocks(taken[:half], count, seed))


@RANDOM
def test_every_free_block_is_drawn_equally_often():
    taken = np.eye(9, dtype=bool)
    draws = sum(patterns.random_blocks(taken, 2, seed).astype(int) for seed in range(800))
    share = draws[~taken] / 800
    assert share.min() > 0.25 - 0.08 and share.max() < 0.25 + 0.08, "2 of 8, five standard deviations of chance"


@RANDOM
def test_every_choice_of_blocks_is_drawn_equally_often():
    taken = np.array([[False, False, True, False, False]])
    draws = [patterns.random_blocks(taken, 2, seed).tobytes() for seed in range(900)]
    share = np.unique(draws, return_counts=True)[1] / 900
    assert len(share) == 6 and abs(share - 1 / 6).max() < 0.06, "pairs of 4, five standard deviations of chance"


@RANDOM
def test_a_row_draws_the_same_whatever_others_have_taken():
    free = np.zeros((6, 12), dtype=bool)
    crowded = free.copy()
    crowded[:3, 2:] = True
    np.testing.assert_array_equal(patterns.random_blocks(free, 3, 5)[3:], patterns.random_blocks(crowded, 3, 5)[3:])


@RANDOM
def test_rows_draw_for_themselves_and_seeds_matter():
    drawn = patterns.random_blocks(np.zeros((20, 30), dtype=bool), 3, seed=1)
    assert len({row.tobytes() for row in drawn}) > 15
    assert (drawn != patterns.random_blocks(np.zeros((20, 30), dtype=bool), 3, seed=2)).any()
    np.testing.assert_array_equal(
        patterns.random_blocks(np.zeros((20, 30), dtype=bool), 3),
        patterns.random_blocks(np.zeros((20, 30), dtype=bool), 3, seed=0),
    )


@RANDOM
@pytest.mark.parametrize(
    ("taken", "count"),
    [
        (np.zeros((2, 2), bool), -1),
        (np.zeros((0, 2), bool), -1),
        (np.zeros(4, bool), 1),
        (np.zeros((2, 2, 2), bool), 1),
        (np.zeros((2, 2)), 1),
        (np.zeros((2, 2), int), 1),
    ],
)
def test_random_blocks_refuse(taken, count):
    with pytest.raises(ValueError):
        patterns.random_blocks(taken, count)


KINDS = st.sampled_from(("nothing", "all", "few", "half", "blocks", "rows without keys", "causal"))
BLOCKS = st.tuples(st.integers(1, 20), st.integers(1, 20))


@MASK
@given(KINDS, st.integers(0, 2**31), SIZES, SIZES, BLOCKS, st.integers(1, 3), st.booleans())
def test_blocks_are_sorted_and_masks_kept(kind, seed, T, S, blocks, heads, predicate):
    dense = [dense_mask(kind, seed + head, T, S, blocks) for head in range(heads)]
    given_ = [as_pattern(x) for x in dense] if predicate else [x.copy() for x in dense]
    mask = patterns.block_mask(given_ if heads > 1 else given_[0], T, S, *blocks)
    assert (mask.shape, mask.block_q, mask.block_k) == ((T, S), *blocks)
    assert mask.partial.dtype == mask.full.dtype == mask.tokens.dtype == bool
    assert mask.partial.shape == mask.full.shape == (heads, -(-T // blocks[0]), -(-S // blocks[1]))
    kept = iter(mask.tokens)
    for head, row, column in np.ndindex(mask.partial.shape):
        block = block_of(dense[head], row, column, *blocks)
        assert mask.full[head, row, column] == block.all()
        assert mask.partial[head, row, column] == (block.any() and not block.all())
        if mask.partial[head, row, column]:
            np.testing.assert_array_equal(next(kept), block)
    assert next(kept, None) is None
    assert predicate or all(map(np.array_equal, given_, dense)), "a mask was changed"


@MASK
def test_blocks_are_of_64_tokens_unless_told():
    mask = patterns.block_mask((np.tri(128, 130, dtype=bool), np.ones((128, 130), bool)), 128, 130)  # a tuple of heads
    assert (mask.block_q, mask.block_k, mask.tokens.shape) == (64, 64, (4, 64, 64))
    assert mask.full.tolist() == [[[False, False, False], [True, False, False]], [[True, True, False]] * 2]


@MASK
def test_a_pattern_is_asked_for_a_row_of_blocks_at_a_time():
    asked = []

    def sees(i, j):
        asked.append(np.broadcast(i, j).size)
        return j <= i

    patterns.block_mask(Pattern(sees), 100, 120, 10, 15)
    assert max(asked) <= 10 * 120


@MASK
@pytest.mark.parametrize(
    ("masks", "options", "error"),
    [
        (np.ones((4, 5), bool), {"T": 5, "S": 4}, ValueError),
        (np.ones((4, 4), bool), {"block_q": 0}, ValueError),
        (np.ones((4, 4), bool), {"block_k": 0}, ValueError),
        (np.ones((4, 4), bool), {"block_k": -8}, ValueError),
        (np.ones((4, 4), bool), {"block_k": 2.0}, TypeError),
        (np.ones((4, 4), bool), {"block_q": 2.5}, TypeError),
        (Pattern(lambda i, j: j <= i), {"T": 4.0}, TypeError),
        (Pattern(lambda i, j: j <= i), {"S": 0}, ValueError),
        (np.ones((2, 4, 4), bool), {}, ValueError),
        (np.ones((4, 4)), {}, TypeError),
        ("causal", {}, TypeError),
        ([], {}, ValueError),
        ([np.ones((4, 4), bool), np.ones((4, 5), bool)], {}, ValueError),
    ],
)
def test_masks_and_blocks_that_do_not_fit_are_refused(masks, options, error):
    with pytest.raises(error):
        patterns.block_mask(masks, **{"T": 4, "S": 4, "block_q": 2, "block_k": 2} | options)


def attend_rows(mask, q, k, v, head=0, times=1.0):
    """`attend_row` for every row of blocks, joined; scale `times` / √D."""
    scale = times * q.shape[-1] ** -0.5
    parts = [
        untouched(patterns.attend_row, q[..., at, :], k, v, mask=mask, head=head, row=row, scale=scale)
        for row, at in enumerate(mask.rows())
    ]
    return np.concatenate([out for out, _ in parts], axis=-2), np.concatenate([lse for _, lse in parts], axis=-1)


@ROW
@given(masked_problems(LENGTHS, st.integers(1, 8), data=("normal", "huge", "rising", "all equal")), BLOCKS)
def test_rows_over_live_blocks_are_attention_with_the_mask(case, blocks):
    problem, heads = case.problem, len(case.masks)
    mask = book.block_mask(list(case.masks), *case.masks[0].shape, *blocks)
    for head in range(heads):
        own = slice(head, head + 1)
        arrays = (problem.q[:, own], problem.k[:, :1], problem.v[:, :1])
        out, lse = attend_rows(mask, *arrays, head)
        expected = definition(*arrays, case.masks[head][None])
        assert_close(out, expected[0], problem)
        assert_close(lse, expected[1], problem)


@ROW
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_that_share_keys_broadcast_and_the_scale_is_the_one_given(batch):
    case = masked("half", 5, (batch, 1, 3), 20, 27, 5, each=False, data="normal")
    mask, (q, k, v) = book.block_mask(case.masks, 20, 27, 8, 8), (case.problem.q, case.problem.k, case.problem.v)
    expected = definition(3 * q, k, v, case.seen)
    for found, truth in zip(attend_rows(mask, q, k, v, times=3), expected, strict=True):
        assert_close(found, truth, case.problem)
    for found, truth in zip(attend_rows(mask, q[0, 1], k[0, 0], v[0, 0], times=3), expected, strict=True):
        assert_close(found, truth[0, 1], case.problem)


@ROW
@pytest.mark.parametrize("kind", ["blocks", "causal", "nothing"])
def test_dead_blocks_are_not_read(kind):
    case = masked(kind, 3, HEADS[0], 40, 48, 4, each=False, data="normal", block=(8, 8))
    mask = book.block_mask(case.masks, 40, 48, 8, 8)
    for row, at in enumerate(mask.rows()):
        dead = np.repeat(~(mask.partial | mask.full)[0, row], 8)[:48]
        k, v = (np.where(dead[:, None], np.nan, x) for x in (case.problem.k, case.problem.v))
        q = case.problem.q[..., at, :]
        out, lse = patterns.attend_row(q, k, v, mask, 0, row, 0.5)
        expected = definition(q, case.problem.k, case.problem.v, case.seen[:, at])
        np.testing.assert_allclose(out, expected[0], **tolerance(np.float64, 48))
        np.testing.assert_allclose(lse, expected[1], **tolerance(np.float64, 48))


@ROW
def test_rows_of_float32_stay_float32_and_scores_far_below_zero_count():
    mask = book.block_mask(np.ones((1, 1), bool), 1, 1, 4, 4)
    arrays = [x.astype(np.float32) for x in (FAR_BELOW.q, FAR_BELOW.k, FAR_BELOW.v)]
    out, lse = patterns.attend_row(*arrays, mask, 0, 0, 1.0)
    assert out.dtype == lse.dtype == np.float32
    assert (out.item(), lse.item()) == (arrays[2].item(), -(2**20))


# --- the kernels --------------------------------------------------------------------------------------------------

MASK_BLOCKS = st.tuples(st.sampled_from((16, 32)), st.sampled_from((16, 32)))
SMALL = st.sampled_from((1, 17, 33)) | st.integers(1, 40)
CASES = masked_problems(SMALL, st.sampled_from((1, 16, 24)), data=("normal", "rising", "huge"), heads=HEADS[:5])


def lists_of(masks, T: int, S: int, blocks: tuple[int, int] = (16, 16)):
    """Masks as the kernels read them."""
    return block_lists.on_device(book.block_mask(list(masks), T, S, *blocks), DEVICE)


@KERNEL
@pytest.mark.kernel
@few_examples
@given(CASES, MASK_BLOCKS, DTYPES, PLACES)
def test_kernel_is_the_reference(case, blocks, dtype, places):
    problem = case.problem
    q, k, v = map(on_device, (problem.q, problem.k, problem.v), [dtype] * 3, places)
    out, lse = fast.block_sparse_attention(q, k, v, lists_of(case.masks, *case.masks[0].shape, blocks))
    expected = definition(problem.q, problem.k, problem.v, case.seen)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_kernel_close(out, expected[0], problem)
    assert_kernel_close(lse, expected[1], problem)


@KERNEL
@pytest.mark.kernel
@settings(max_examples=3)
@given(st.integers(0, 2**31), st.sampled_from(((16, 32), (32, 16))))
def test_kernel_over_full_and_partial_blocks_with_a_rising_maximum(seed, blocks):
    case = masked("blocks", seed, (1, 1, 2), 64, 96, 16, each=True, data="rising", block=blocks)
    q, k, v = (on_device(x, torch.float32) for x in (case.problem.q, case.problem.k, case.problem.v))
    out, lse = fast.block_sparse_attention(q, k, v, lists_of(case.masks, 64, 96, blocks))
    expected = definition(case.problem.q, case.problem.k, case.problem.v, case.seen)
    assert_kernel_close(out, expected[0], case.problem)
    assert_kernel_close(lse, expected[1], case.problem)


@KERNEL
@pytest.mark.kernel
def test_kernel_reads_no_dead_block():
    dense = np.zeros((32, 64), dtype=bool)
    dense[:, 16:32], dense[3:30, 50:60] = True, True
    dense[5] = False
    case = masked("all", 0, HEADS[0], 32, 64, 16, each=False, data="normal")
    dead = np.repeat([True, False, True, False], 16)[:, None]
    k, v = (np.where(dead, np.nan, x) for x in (case.problem.k, case.problem.v))
    out, lse = fast.block_sparse_attention(
        *(on_device(x, torch.float32) for x in (case.problem.q, k, v)), lists_of([dense], 32, 64)
    )
    expected = definition(case.problem.q, case.problem.k, case.problem.v, dense[None])
    assert_float32_close(out, expected[0])
    assert_float32_close(lse, expected[1])


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # both hold the score, -2^20, and v exactly
def test_kernel_with_scores_far_below_zero(dtype):
    arrays = (on_device(x, dtype) for x in (FAR_BELOW.q, FAR_BELOW.k, FAR_BELOW.v))
    out, lse = fast.block_sparse_attention(*arrays, lists_of([np.ones((1, 1), bool)], 1, 1))
    assert_float32_close(lse, np.full((1, 1, 1), -(2.0**20)))
    assert out.item() == FAR_BELOW.v.item()


@KERNEL
@pytest.mark.kernel
def test_kernel_sums_what_float16_cannot_hold_and_computes_in_float32():
    q, v = (torch.full((1, 1, 32, 16), value, dtype=torch.float16, device=DEVICE) for value in (256, 8192))
    out, _ = fast.block_sparse_attention(q[:, :, :16], q, v, lists_of([np.ones((16, 32), bool)], 16, 32), 2.0**-20)
    torch.testing.assert_close(out, v[:, :, :16])
    case = masked("half", 1, HEADS[0], 16, 48, 16, each=False, data="normal")
    arrays = (on_device(x, torch.float32, Place(across=True)) for x in (case.problem.q, case.problem.k, case.problem.v))
    out, _ = fast.block_sparse_attention(*arrays, lists_of(case.masks, 16, 48))
    assert_float32_close(out, definition(case.problem.q, case.problem.k, case.problem.v, case.seen)[0])


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize(("D", "begins"), [(16, False), (24, True)])
def test_kernel_loads_nothing_beyond_its_inputs(D, begins):
    case = masked("half", 0, (1, 2, 1), 17, 19, D, each=False, data="normal")
    arrays = (at_the_wall(x, begins) for x in (case.problem.q, case.problem.k, case.problem.v))
    out, _ = fast.block_sparse_attention(*arrays, lists_of(case.masks, 17, 19))
    assert_float32_close(out, definition(case.problem.q, case.problem.k, case.problem.v, case.seen)[0])
