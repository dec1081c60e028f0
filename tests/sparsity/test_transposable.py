"""Transposable N:M: masks against every mask there is, against linear programming, against torch; the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import _sparse_semi_structured_tile as torch_greedy

from chapters.sparsity import transposable
from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.sparsity.blocks import REFUSED, cut, every_mask, greedy_by_loop, optimum
from tests.sparsity.drawn import CONTENTS, SEEDS, contents

PATTERNS = pytest.mark.exercise("chapters.sparsity.transposable.transposable_patterns", points=2)
BEST = pytest.mark.exercise("chapters.sparsity.transposable.best_mask", points=2)
GREEDY = pytest.mark.exercise("chapters.sparsity.transposable.greedy_mask", points=3)
DIVERSITY = pytest.mark.exercise("chapters.sparsity.transposable.mask_diversity", points=2)
FIRST_BEST = pytest.mark.exercise("kernels.sparsity.transposable.first_best", points=2)
MARKS = {mark.args[0].rpartition(".")[2]: mark for mark in (PATTERNS, BEST, GREEDY, DIVERSITY)}

fast = kernel("sparsity.transposable")
SIDES = st.integers(1, 5)
KINDS = st.sampled_from(CONTENTS)
SMALL = [(n, m) for m in (1, 2, 3, 4) for n in range(1, m + 1)]


# --- all masks ----------------------------------------------------------------------------------------------------


@PATTERNS
@pytest.mark.parametrize(("n", "m"), SMALL)
def test_patterns_are_all_there_are_in_falling_order(n, m):
    found = transposable.transposable_patterns(n, m)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, every_mask(n, m))


@DIVERSITY
@pytest.mark.parametrize(("n", "m"), SMALL)
def test_diversity_is_how_many_masks_there_are(n, m):
    assert transposable.mask_diversity(n, m) == len(every_mask(n, m))


@DIVERSITY
@pytest.mark.parametrize(("n", "m", "count"), [(1, 6, 720), (2, 5, 2040), (3, 6, 297200), (2, 6, 67950)])
def test_diversity_of_larger_blocks(n, m, count):
    """Known counts: permutations, and matrices of zeros and ones with equal sums (OEIS A001499, A058527)."""
    assert transposable.mask_diversity(n, m) == count == transposable.mask_diversity(n, m)
    assert transposable.mask_diversity(m - n, m) == count  # what is dropped is such a mask, too


def test_diversity_of_4_of_8():
    assert transposable.mask_diversity(4, 8) == 116963796250


# --- the best mask ------------------------------------------------------------------------------------------------


@BEST
@given(st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (1, 3)]), KINDS, SIDES, SIDES, SEEDS)
def test_the_first_of_the_best_masks_is_taken_in_every_block(pattern, kind, high, wide, seed):
    n, m = pattern
    weight, patterns = contents(kind, (high * m, wide * m), seed), every_mask(n, m)
    mine = weight.copy()
    mask = transposable.best_mask(mine, patterns)
    assert mask.dtype == bool and mask.shape == weight.shape
    for block, found in zip(cut(weight, m), cut(mask, m), strict=True):
        sums = [sum(abs(value) for value in block[kept].tolist()) for kept in patterns]
        np.testing.assert_array_equal(found, patterns[sums.index(max(sums))])
    np.testing.assert_array_equal(mine, weight)


@BEST
def test_patterns_are_taken_as_they_come_and_int8_has_its_lowest_value():
    weight = np.array([[-128, 127], [127, 127]], dtype=np.int8)
    patterns = every_mask(1, 2)
    np.testing.assert_array_equal(transposable.best_mask(weight, patterns), [[1, 0], [0, 1]])
    close = np.array([[1, 1 + 1e-12], [1, 1]])  # equal in float32
    np.testing.assert_array_equal(transposable.best_mask(close, patterns), [[0, 1], [1, 0]])
    assert transposable.best_mask(close, np.ones((1, 1, 1), bool)).all()
    ones = np.ones((2, 4))
    np.testing.assert_array_equal(transposable.best_mask(ones, patterns), [[1, 0, 1, 0], [0, 1, 0, 1]])
    np.testing.assert_array_equal(transposable.best_mask(ones, patterns[::-1]), [[0, 1, 0, 1], [1, 0, 1, 0]])
    np.testing.assert_array_equal(transposable.best_mask(ones * 1e-300, patterns[1:]), [[0, 1, 0, 1], [1, 0, 1, 0]])


@given(KINDS, SEEDS)
def test_the_best_mask_is_the_optimum_of_the_linear_program(kind, seed):
    weight = contents(kind, (4, 4), seed)
    scale = float(np.abs(weight).max()) + 1e-300
    kept = np.abs(weight[transposable.transposable_mask(weight)]).sum() / scale
    np.testing.assert_allclose(kept, optimum(weight / scale, 2, True), rtol=1e-7, atol=1e-9)


# --- greedy -------------------------------------------------------------------------------------------------------


@GREEDY
@given(st.sampled_from([(2, 4), (1, 1), (1, 3), (4, 8), (3, 7), (2, 8), (4, 4)]), KINDS, SIDES, SIDES, SEEDS)
def test_greedy_takes_the_heaviest_that_fits(pattern, kind, high, wide, seed):
    n, m = pattern
    weight = contents(kind, (high * m, wide * m), seed)
    mine = weight.copy()
    mask = transposable.greedy_mask(mine, n, m)
    assert mask.dtype == bool and mask.shape == weight.shape
    for block, found in zip(cut(weight, m), cut(mask, m), strict=True):
        np.testing.assert_array_equal(found, greedy_by_loop(block, n))
    np.testing.assert_array_equal(mine, weight)


@GREEDY
def test_of_equals_the_first_in_the_block_is_taken():
    """Sorts that are not stable often look so in short rows: here they have 256."""
    found = transposable.greedy_mask(np.ones((16, 16)), 8, 16)
    np.testing.assert_array_equal(found, np.kron(np.eye(2), np.ones((8, 8))))
    found = transposable.greedy_mask(np.array([[-128, 127], [127, 127]], dtype=np.int8), 1, 2)
    np.testing.assert_array_equal(found, np.eye(2))
    found = transposable.greedy_mask(np.array([[1, 1 + 1e-12], [1, 1]]), 1, 2)  # equal in float32
    np.testing.assert_array_equal(found, np.eye(2)[::-1])


@given(st.integers(1, 3), st.integers(1, 4), SEEDS)
def test_greedy_is_that_of_torch(high, wide, seed):
    weight = torch.from_numpy(np.random.default_rng(seed).permutation(16 * high * wide).reshape(4 * high, -1) + 1.0)
    expected = torch_greedy(weight.abs().clone()) != 0
    np.testing.assert_array_equal(transposable.greedy_mask(weight.numpy(), 2, 4), expected.numpy())


@given(st.sampled_from([(1, 2), (2, 4), (4, 8), (2, 6)]), KINDS, SEEDS)
def test_greedy_keeps_half_of_the_optimum_at_least_and_never_more_than_all(pattern, kind, seed):
    n, m = pattern
    weight = contents(kind, (m, m), seed)
    weight /= np.abs(weight).max() + 1e-300
    kept, best = np.abs(weight[transposable.greedy_mask(weight, n, m)]).sum(), optimum(weight, n, False)
    assert best / 2 - 1e-9 <= kept <= best + 1e-9


def test_greedy_may_leave_a_row_and_a_column_one_short():
    """And then keep less than the best full mask, or more."""
    worse = np.array([[3, 7, 5, 8], [9, 9, 7, 4], [9, 6, 7, 8], [9, 4, 1, 8]])
    better = np.array([[9, 8, 1, 1], [7, 1, 6, 1], [1, 5, 4, 1], [1, 1, 1, 1]])
    for weight, greedily, at_best in ((worse, 51, 64), (better, 40, 38)):
        mask, full = transposable.greedy_mask(weight, 2, 4), transposable.transposable_mask(weight, 2, 4)
        assert mask.sum() == 7 and full.sum() == 8
        assert transposable.obeys(mask, 2, 4) and transposable.obeys(mask.T, 2, 4)
        assert (weight[mask].sum(), weight[full].sum()) == (greedily, at_best)


# --- bad input: here the type of the error is graded, in test_transposable_in_model.py its words ---------------------


@pytest.mark.parametrize(
    ("function", "case"),
    [pytest.param(name, case, marks=MARKS[name]) for name, cases in REFUSED.items() for case in cases],
)
def test_bad_input_is_refused(function, case):
    with pytest.raises(ValueError):
        getattr(transposable, function)(*REFUSED[function][case])


# --- the kernel ---------------------------------------------------------------------------------------------------

TABLE = torch.from_numpy(every_mask(2, 4)).to(DEVICE)


@FIRST_BEST
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@given(kind=st.sampled_from(["normal", "ties", "mostly zero", "all equal"]), high=st.integers(1, 5),
       wide=st.integers(1, 37), seed=SEEDS, aligned=st.booleans())  # fmt: skip
def test_kernel_takes_the_mask_of_the_reference(dtype, kind, high, wide, seed, aligned):
    """Whole numbers of 1/64, which float32 adds exactly: equal sums are equal, and the first wins."""
    weight = np.round(64 * contents(kind, (4 * high, 4 * wide), seed)) / 64
    found = fast.best_mask(poisoned(torch.from_numpy(weight).to(DEVICE, dtype), aligned), TABLE, 2, 16)
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(
        found.cpu().numpy(), oracle("sparsity.transposable").best_mask(weight, every_mask(2, 4))
    )


@FIRST_BEST
@pytest.mark.kernel
def test_kernel_adds_in_float32():
    """2050 and 2050.5 are one number in float16: then the first of two masks would win."""
    weight = torch.zeros(4, 4, dtype=torch.float16, device=DEVICE)
    weight[0, 0], weight[0, 1], weight[1, 2] = 2048, 2, 0.5
    better = np.eye(4, dtype=bool)[[0, 2, 2, 3]] | np.eye(4, dtype=bool)[[1, 3, 3, 0]]
    patterns = np.stack([better & (np.arange(4) != 1)[:, None], better])
    found = fast.best_mask(weight, torch.from_numpy(patterns).to(DEVICE), 1, 16)
    np.testing.assert_array_equal(found.cpu().numpy(), better)


@pytest.mark.kernel
@given(kind=st.sampled_from(["huge", "tiny", "outlier column"]), seed=SEEDS)
def test_kernel_keeps_as_much_as_the_reference_of_any_numbers(kind, seed):
    weight = contents(kind, (8, 24), seed).astype(np.float16)
    found = fast.best_mask(torch.from_numpy(weight).to(DEVICE), TABLE, 1, 16).cpu().numpy()
    exact = np.abs(weight.astype(np.float64))
    best = transposable.best_mask(weight, every_mask(2, 4))
    for values, mine, expected in zip(cut(exact, 4), cut(found, 4), cut(best, 4), strict=True):
        assert mine.sum(0).tolist() == mine.sum(1).tolist() == [2] * 4
        np.testing.assert_allclose(values[mine].sum(), values[expected].sum(), **tolerance(np.float32))


@pytest.mark.kernel
def test_kernel_keeps_what_is_not_a_number_and_the_blocks_beside_it():
    weight = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    expected = fast.best_mask(weight, TABLE, 1, 16)
    weight[1, 2], weight[2, 1] = float("nan"), -float("inf")
    found = fast.best_mask(weight, TABLE, 1, 16)
    assert found[1, 2] and found[2, 1]
    assert torch.equal(found[4:], expected[4:]) and torch.equal(found[:, 4:], expected[:, 4:])


@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("operand", [0, 1])
def test_kernel_reads_nothing_outside_its_operands(operand, begins):
    """It comes last, because a kernel that does ends the process."""
    operands = [torch.ones(12, 20, dtype=torch.float16, device=DEVICE), TABLE]
    operands[operand] = walled(operands[operand], begins)
    fast.best_mask(*operands, 2, 16)
