"""Experts: each step against a loop over rows, exact small cases, and the kernel against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.moe import experts
from tests.conftest import DEVICE, HAS_TRITON, KERNEL_DTYPES, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.moe.lines import SEEDS, choices

PERMUTE = pytest.mark.exercise("chapters.moe.experts.permute", points=2)
GROUPED = pytest.mark.exercise("chapters.moe.experts.grouped_matmul", points=3)
COMBINE = pytest.mark.exercise("chapters.moe.experts.combine", points=2)
LOCATE = pytest.mark.exercise("kernels.moe.experts.locate", points=4)

fast = kernel("moe.experts")
WIDTHS = st.sampled_from([1, 3, 8, 17, 33])
ROWS = st.sampled_from([1, 2, 7, 13, 16, 17, 33])
DTYPES = st.sampled_from([np.float32, np.float64])


def runs(rng: np.random.Generator, count: int, rows: int) -> np.ndarray:
    """Offsets of `count` experts in `rows` rows, of which some get none, and some rows nobody."""
    liked = np.append(rng.exponential(size=count) ** 3 * (rng.random(count) < 0.7), 0.1 * rng.random())
    share = np.cumsum(liked) / max(liked.sum(), 1e-9)
    return np.concatenate(([0], np.floor(share[:count] * rows))).astype(np.int64)


# --- sorting by expert --------------------------------------------------------------------------------------------


@PERMUTE
@given(choices(), st.sampled_from([0.0, 0.5, 1.0]), SEEDS)
def test_choices_are_listed_expert_by_expert_and_the_dropped_ones_last(chosen, share, seed):
    expert, count = chosen
    kept = np.random.default_rng(seed).random(expert.shape) < share
    before = expert.copy(), kept.copy()
    order, offsets = experts.permute(expert, kept, count)
    numbered = list(enumerate(zip(expert.ravel().tolist(), kept.ravel().tolist(), strict=True)))
    lines = [[number for number, (e, stays) in numbered if stays and e == one] for one in range(count)]
    dropped = [number for number, (_, stays) in numbered if not stays]
    assert order.tolist() == [number for line in [*lines, dropped] for number in line]
    assert offsets.tolist() == [sum(map(len, lines[:e])) for e in range(count + 1)]
    assert order.dtype == offsets.dtype == np.int64
    np.testing.assert_array_equal(expert, before[0])
    np.testing.assert_array_equal(kept, before[1])


@PERMUTE
def test_exactly_this_order():
    """Nobody chose expert 1, and expert 3 dropped the only one that did."""
    expert = np.array([[2, 0], [0, 3], [2, 0]], dtype=np.int32)
    kept = np.array([[True, True], [True, False], [True, False]])
    order, offsets = experts.permute(expert, kept, 4)
    assert order.tolist() == [1, 2, 0, 4, 3, 5] and offsets.tolist() == [0, 2, 2, 4, 4]
    order, offsets = experts.permute(np.zeros((0, 2), int), np.zeros((0, 2), bool), 3)
    assert order.tolist() == [] and offsets.tolist() == [0, 0, 0, 0]
    order, offsets = experts.permute(expert.astype(np.int8), kept, 300)  # more than int8 can number
    assert order.tolist() == [1, 2, 0, 4, 3, 5] and offsets.tolist() == [0, 2, 2, *[4] * 298]


UNSORTABLE = {
    "no such expert": ([[0, 4]], [[True, True]], 4, "range"),
    "nor when dropped": ([[0, 4]], [[True, False]], 4, "range"),
    "negative": ([[-1]], [[True]], 4, "range"),
    "other shape": ([[0, 1]], [[True]], 4, "shapes"),
    "one axis": ([0, 1], [True, True], 4, "shapes"),
    "three axes": ([[[0, 1]]], [[[True, True]]], 4, "shapes"),
    "kept of one choice": ([[0, 1]], [[True]], 4, "shapes"),
    "negative and dropped": ([[0, -1]], [[True, False]], 4, "range"),
    "no experts": (np.zeros((0, 1), int), np.zeros((0, 1), bool), 0, "at least 1"),
}


@PERMUTE
@pytest.mark.parametrize("case", UNSORTABLE)
def test_choices_that_cannot_be_sorted_are_refused(case):
    expert, kept, count, _ = UNSORTABLE[case]
    with pytest.raises(ValueError):
        experts.permute(np.array(expert), np.array(kept), count)


# --- the grouped product ------------------------------------------------------------------------------------------


@GROUPED
@given(ROWS, st.integers(1, 9), WIDTHS, WIDTHS, DTYPES, st.tuples(*[st.booleans()] * 3), SEEDS)
def test_each_row_meets_the_matrix_of_its_run(rows, count, out, width, dtype, options, seed):
    """What nobody needs is NaN: matrices of experts without rows, and the rows of x that nobody has."""
    rng = np.random.default_rng(seed)
    offsets = runs(rng, count, rows)
    nobodys = np.arange(rows) >= offsets[-1]
    x, weight = rng.normal(size=(rows, width)).astype(dtype), rng.normal(size=(count, out, width)).astype(dtype)
    weight[np.diff(offsets) == 0] = np.nan
    source = np.where(nobodys, rows, rng.integers(0, max(rows // 2, 1), rows)) if options[0] else None
    target = rng.permutation(rows) if options[1] else None
    scale = rng.normal(size=rows).astype(dtype) if options[2] else None
    if options[0]:
        x = np.append(x, np.full((1, width), np.nan, dtype), axis=0)
    else:
        x[nobodys] = np.nan
    given_ = [None if part is None else part.copy() for part in (x, weight, offsets, source, target, scale)]
    y = experts.grouped_matmul(x, weight, offsets, source, target, scale)
    wanted = np.zeros((rows, out))
    for i in range(offsets[-1]):
        e = next(e for e in range(count) if offsets[e] <= i < offsets[e + 1])
        to = i if target is None else target[i]
        row = x[i if source is None else source[i]].astype(np.float64)
        wanted[to] = (1 if scale is None else scale[to]) * (weight[e].astype(np.float64) @ row)
    np.testing.assert_allclose(y, wanted, **tolerance(dtype, width, 4))
    assert y.shape == (rows, out) and y.dtype == dtype
    for old, part in zip(given_, (x, weight, offsets, source, target, scale), strict=True):
        np.testing.assert_array_equal(part, old)


@GROUPED
def test_exactly_this_product():
    """Rows 0 and 1 are expert 0's, none is expert 1's, row 2 is expert 2's, row 3 nobody's, with a scale of NaN."""
    x, weight = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[[1.0, 0.0]], [[np.nan, np.nan]], [[0.0, 10.0]]])
    offsets, source, target = np.array([0, 2, 2, 3]), np.array([1, 0, 1, 0]), np.array([2, 0, 3, 1])
    y = experts.grouped_matmul(x, weight, offsets, source, target, np.array([2.0, np.nan, 3.0, 5.0]))
    np.testing.assert_array_equal(y, [[2.0], [0.0], [9.0], [200.0]])
    narrow = x.astype(np.float32), weight.astype(np.float32)
    for one, other, dtype in ((*narrow, np.float32), (narrow[0], weight, np.float64), (x, narrow[1], np.float64)):
        mixed = experts.grouped_matmul(one, other, offsets[[0, 0, 0, 1]], scale=np.array([1.0, 0.5]))
        assert mixed.dtype == dtype and mixed.tolist() == [[20.0], [20.0]]
    assert experts.grouped_matmul(x[:0], weight, np.zeros(4, int)).shape == (0, 1)


BAD = {
    "x too narrow": ({"x": np.zeros((3, 4))}, "x must be"),
    "weight a matrix": ({"weight": np.zeros((4, 5))}, "x must be"),
    "an offset too few": ({"offsets": np.array([0, 3])}, "offsets must be"),
    "not from 0": ({"offsets": np.array([1, 2, 3])}, "rise from 0"),
    "falling": ({"offsets": np.array([0, 3, 2])}, "rise from 0"),
    "more rows than there are": ({"offsets": np.array([0, 2, 4])}, "at most 3"),
    "no such source": ({"source": np.array([0, 1, 3])}, "source must be"),
    "negative source": ({"source": np.array([0, 1, -1])}, "source must be"),
    "negative target": ({"target": np.array([0, 1, -1])}, "target must list"),
    "target twice": ({"target": np.array([0, 1, 1])}, "target must list"),
    "short target": ({"target": np.array([0, 1])}, "target must list"),
    "short scale": ({"scale": np.zeros(2)}, "scale must have"),
}


def bad_product(case: str) -> dict:
    good = {"x": np.zeros((3, 5)), "weight": np.zeros((2, 4, 5)), "offsets": np.array([0, 2, 3])}
    return good | BAD[case][0]


@GROUPED
@pytest.mark.parametrize("case", BAD)
def test_operands_that_do_not_fit_are_refused(case):
    with pytest.raises(ValueError):
        experts.grouped_matmul(**bad_product(case))


def test_refusals_say_what_is_wrong():
    for case, (_, words) in BAD.items():
        with pytest.raises(ValueError, match=words):
            experts.grouped_matmul(**bad_product(case))
    for expert, kept, count, words in UNSORTABLE.values():
        with pytest.raises(ValueError, match=words):
            experts.permute(np.array(expert), np.array(kept), count)
    with pytest.raises(ValueError, match="y and order must have 2 · 2 rows"):
        experts.combine(np.zeros((3, 1)), np.arange(3), np.zeros((2, 2)))
    for hidden, activation in ((np.zeros((1, 2)), "gelu"), (np.zeros((1, 3)), "swiglu")):
        with pytest.raises(ValueError, match=f"{activation!r} with {hidden.shape[1]}"):
            experts.activate(hidden, activation)


# --- back to the tokens -------------------------------------------------------------------------------------------


@COMBINE
@given(ROWS, st.integers(1, 4), WIDTHS, DTYPES, SEEDS)
def test_a_token_gets_the_weighed_sum_of_its_rows(tokens, k, out, dtype, seed):
    rng = np.random.default_rng(seed)
    order, weight = rng.permutation(tokens * k), rng.normal(size=(tokens, k)) * (rng.random((tokens, k)) < 0.7)
    y = rng.normal(size=(tokens * k, out)).astype(dtype)
    y[weight.ravel()[order] == 0] = np.nan  # dropped, and perhaps never computed
    before = y.copy(), order.copy(), weight.copy()
    found = experts.combine(y, order, weight)
    row = {int(number): y[i] for i, number in enumerate(order)}
    for t in range(tokens):
        wanted = sum((weight[t, j] * row[t * k + j].astype(float) for j in range(k) if weight[t, j]), np.zeros(out))
        np.testing.assert_allclose(found[t], wanted, **tolerance(dtype, k))
    assert found.dtype == dtype and found.shape == (tokens, out)
    for old, part in zip(before, (y, order, weight), strict=True):
        np.testing.assert_array_equal(part, old)


@COMBINE
def test_terms_are_added_best_first():
    """(1e8 + 1) - 1e8 is 0 in float32; in the order of the rows, 1e8 - 1e8 + 1, it would be 1."""
    y, order = np.array([[1e8], [-1e8], [1.0]], np.float32), np.array([0, 2, 1])
    assert experts.combine(y, order, np.ones((1, 3))).tolist() == [[0.0]]
    assert experts.combine(y, order, np.array([[1.0, 3.0, 0.0]])).tolist() == [[np.float32(1e8) + 3]]
    assert experts.combine(y[:0], order[:0], np.ones((0, 3))).shape == (0, 1)


@COMBINE
@pytest.mark.parametrize("shapes", [((3, 1), (3,), (2, 2)), ((4, 1), (3,), (2, 2)), ((4,), (4,), (2, 2))])
def test_rows_that_are_not_those_of_the_choices_are_refused(shapes):
    y, order, weight = shapes
    with pytest.raises(ValueError):
        experts.combine(np.zeros(y), np.arange(*order), np.ones(weight))


# --- the kernel ---------------------------------------------------------------------------------------------------

if HAS_TRITON:
    import triton
    import triton.language as tl

    locate = fast.locate

    @triton.jit
    def walk_kernel(begin, end, total, columns, out, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
        group = tl.arange(0, WIDTH)
        first, last = tl.load(begin + group), tl.load(end + group)
        for tile in range(0, total):
            found, row, stop, column = locate(first, last, tile, columns, BLOCK_M, GROUP, WIDTH)
            tl.store(out + 4 * tile, found)
            tl.store(out + 4 * tile + 1, row)
            tl.store(out + 4 * tile + 2, stop)
            tl.store(out + 4 * tile + 3, column)


def tiles_in_order(begin: list[int], end: list[int], columns: int, block: int, height: int) -> list[tuple]:
    """All tiles, as the docstring of `locate` numbers them."""
    listed = []
    for group, (first, stop) in enumerate(zip(begin, end, strict=True)):
        rows = list(range(first, stop, block))
        for band in range(0, len(rows), height):
            listed += [(group, row, stop, column) for column in range(columns) for row in rows[band : band + height]]
    return listed


@LOCATE
@pytest.mark.kernel
@settings(max_examples=15)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.sampled_from([1, 2, 4]), SEEDS)
def test_tiles_are_numbered_expert_by_expert_in_bands(width, columns, height, seed):
    """No group without rows has a tile: its matrix is not read."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 16, 17, 50], width)
    end = np.cumsum(sizes).astype(np.int32)
    begin = end - sizes.astype(np.int32)
    wanted = tiles_in_order(begin.tolist(), end.tolist(), columns, 16, height)
    found = torch.full((len(wanted) + 1, 4), -1, dtype=torch.int32, device=DEVICE)
    places = poisoned(torch.from_numpy(begin).to(DEVICE)), poisoned(torch.from_numpy(end).to(DEVICE))
    walk_kernel[(1,)](*places, len(wanted), columns, found, BLOCK_M=16, GROUP=height, WIDTH=width)
    assert [tuple(row) for row in found[:-1].tolist()] == wanted


def product(rows: int, count: int, out: int, width: int, options: tuple, dtype: torch.dtype, seed: int) -> list:
    """Operands of a grouped product that a kernel may be given, as arrays; indices may be int32."""
    rng = np.random.default_rng(seed)
    offsets = runs(rng, count, rows)
    x, weight = rng.normal(size=(rows, width)), rng.normal(size=(count, out, width)) / np.sqrt(width)
    source = rng.integers(0, rows, rows) if options[0] else None
    target = rng.permutation(rows).astype(np.int32) if options[1] else None
    scale = rng.normal(size=rows) if options[2] else None
    made = [
        torch.from_numpy(part) if part is not None else None for part in (x, weight, offsets, source, target, scale)
    ]
    return [part.to(dtype) if part is not None and part.is_floating_point() else part for part in made]


def agree(found: torch.Tensor, operands: list, width: int) -> None:
    """The kernel's result against the reference in float64."""
    arrays = [None if part is None else (part.double() if part.is_floating_point() else part) for part in operands]
    wanted = oracle("moe.experts").grouped_matmul(*(None if part is None else part.numpy() for part in arrays))
    assert found.dtype == operands[0].dtype
    np.testing.assert_allclose(found.double().cpu(), wanted, **tolerance(found.dtype, width, 2))


@LOCATE
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@settings(max_examples=20)
@given(ROWS, st.integers(1, 9), WIDTHS, st.sampled_from([1, 16, 37]), st.tuples(*[st.booleans()] * 3), SEEDS,
       st.sampled_from([1, 3, 16]), st.booleans())  # fmt: skip
def test_kernel_multiplies_like_the_reference(dtype, rows, count, out, width, options, seed, programs, aligned):
    operands = product(rows, count, out, width, options, dtype, seed)
    there = [None if part is None else poisoned(part.to(DEVICE), aligned) for part in operands]
    blocks = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP": 2}
    agree(fast.grouped_matmul(*there, **blocks, programs=programs), operands, width)


@LOCATE
@pytest.mark.kernel
@pytest.mark.parametrize("options", [(True, False, False), (False, True, True)])
def test_kernel_with_tiles_of_its_own_choice(options):
    """Those of a decode step in half precision; 70 columns are one past a tile, and 150 past a step."""
    operands = product(6, 5, 70, 150, options, torch.float16, 1)
    agree(fast.grouped_matmul(*(None if part is None else part.to(DEVICE) for part in operands)), operands, 150)


@LOCATE
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernel_reads_nothing_outside_its_inputs(begins):
    operands = [walled(part.to(DEVICE), begins) for part in product(19, 3, 17, 33, (True,) * 3, torch.float32, 2)]
    fast.grouped_matmul(*operands, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, programs=4)
