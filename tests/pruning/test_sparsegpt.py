"""SparseGPT against its definition and the arrays of its authors' code; the kernel on a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.pruning import sparsegpt as chapter
from chapters.pruning.sparsegpt import obs_step, solve_block, sparsegpt, threshold_mask
from tests.conftest import DEVICE, golden, kernel, poisoned, tolerance
from tests.fences import walled
from tests.pruning.eliminated import close, damped, keep_only, kept_of, one_gone, solved_by_hand
from tests.quantization.problems import layers, nearest
from tests.sparsity.drawn import CONTENTS, SEEDS, contents, first_largest

fast = kernel("pruning.sparsegpt")
SHARES = st.sampled_from([0.0, 0.29, 0.5, 0.7, 0.99])
RELEASED = {
    "u50_bs128": {},
    "u50_bs16": {"block_size": 16},
    "u70_bs32": {"sparsity": 0.7, "block_size": 32},
    "s4of8_bs32": {"pattern": (4, 8), "block_size": 32},
}
ONES, EYE, NAN = np.ones((2, 4)), np.eye(4), float("nan")


@pytest.fixture
def others_from_the_book(request, monkeypatch):
    """Each class grades one function: what it may call comes from the book, whether or not it is written yet."""
    keep_only(request.cls.function, chapter, monkeypatch)


@pytest.mark.exercise("chapters.pruning.sparsegpt.obs_step", points=2)
class TestObsStep:
    @settings(max_examples=12)
    @given(layers(dead=False), SEEDS)
    def test_moves_what_is_left_to_the_best_place(self, layer, seed):
        weight, columns, rng = layer.weight, layer.weight.shape[1], np.random.default_rng(seed)
        h = damped(layer.hessian, 0.01)
        w, inverse = weight.copy(), np.repeat(np.linalg.inv(h)[None], len(weight), axis=0)
        order = np.array([rng.permutation(columns) for _ in weight])[:, : min(columns, 3)]  # [out, steps]
        for step, j in enumerate(order.T):
            w, inverse = obs_step(w, inverse, j)
            for row, gone in enumerate(order[:, : step + 1].tolist()):
                left = [k for k in range(columns) if k not in gone]
                np.testing.assert_allclose(w[row], one_gone(weight[row], h, gone), **close(columns, weight))
                assert not w[row, gone[-1]] and not inverse[row, gone].any() and not inverse[row][:, gone].any()
                rest = np.linalg.inv(h[np.ix_(left, left)])
                np.testing.assert_allclose(inverse[row][np.ix_(left, left)], rest, **close(columns, np.linalg.inv(h)))

    def test_leaves_its_arguments_alone(self):
        weight, inverse, j = np.array([[1.0, 2.0]]), np.array([[[2.0, 1.0], [1.0, 2.0]]]), np.array([1])
        copies = weight.copy(), inverse.copy(), j.copy()
        found = obs_step(weight, inverse, j)
        assert all(np.array_equal(*pair) for pair in zip(copies, (weight, inverse, j), strict=True))
        assert found[0].tolist() == [[0, 0]] and found[1].tolist() == [[[1.5, 0], [0, 0]]]


@pytest.mark.exercise("chapters.pruning.sparsegpt.threshold_mask", points=1)
class TestThresholdMask:
    @given(st.sampled_from(CONTENTS), st.integers(1, 5), st.integers(1, 9), SEEDS, SHARES, st.booleans())
    def test_counts_as_released_or_exactly(self, kind, rows, columns, seed, sparsity, exact):
        score = contents(kind, (rows, columns), seed) ** 2
        given_ = score.copy()
        found = threshold_mask(given_, sparsity, exact)
        assert found.dtype == bool and np.array_equal(given_, score)
        np.testing.assert_array_equal(found, kept_of(score, sparsity, exact))

    def test_as_released_one_more_goes_and_what_equals_it(self):
        score = np.array([[1.0, 2.0], [3.0, 3.0]])
        assert threshold_mask(score, 0).tolist() == [[False, True], [True, True]]
        assert threshold_mask(score, 0.5).tolist() == [[False, False], [False, False]]
        assert threshold_mask(score, 0.5, exact=True).tolist() == [[False, False], [True, True]]
        assert threshold_mask(score, 0.75, exact=True).tolist() == [[False, False], [True, False]]
        assert threshold_mask(np.arange(100.0), 0.29).sum() == 71  # 0.29 · 100 is below 29
        assert threshold_mask(np.arange(100.0), 0.29, exact=True).sum() == 71

    def test_equals_go_from_the_last_row_and_nothing_is_too_near_or_too_small_to_compare(self):
        for score in (np.ones((3, 4)), np.ones((4, 3)).T):
            assert threshold_mask(score, 0.5, exact=True).tolist() == [
                [True] * 4,
                [True, True, False, False],
                [False] * 4,
            ]
        score = np.asfortranarray([[1.0, 1 + 2**-40], [0.0, 1e-200]])
        for sparsity, exact, kept in ((0.5, False, [1]), (0.25, True, [0, 1, 3]), (0.75, True, [1])):
            assert np.flatnonzero(threshold_mask(score, sparsity, exact)).tolist() == kept

    @pytest.mark.parametrize("sparsity", [1.0, -0.1, NAN])
    @pytest.mark.parametrize("exact", [False, True])
    def test_refuses_another_share(self, sparsity, exact):
        with pytest.raises(ValueError):
            threshold_mask(ONES, sparsity, exact)


def block(seed: int, rows: int, columns: int, bits: int | None) -> tuple:
    """weight, upper, mask and grid of a block, some weights half-way between two codes."""
    rng = np.random.default_rng(seed)
    weight, mask = rng.standard_normal((rows, columns)) * 3, rng.random((rows, columns)) < 0.5
    upper = np.diag(rng.uniform(0.5, 2, columns)) + 0.3 * np.triu(rng.standard_normal((columns, columns)), 1)
    scale, zero = 2.0 ** rng.integers(-3, 3, rows), rng.integers(0, 2 ** (bits or 1), rows).astype(float)
    weight[:, 0] = (rng.integers(-9, 9, rows) + 0.5) * scale
    return weight, upper, mask, (scale, zero, bits) if bits else None


def block_by_hand(weight, upper, mask=None, pattern=None, grid=None):
    """Solved, errors and mask, one weight after another."""
    w, solved, errors = weight.copy(), np.zeros(weight.shape), np.zeros(weight.shape)
    keep = np.zeros(weight.shape, bool) if mask is None else mask
    for row in range(len(w)):
        for j in range(w.shape[1]):
            if pattern and j % pattern[1] == 0:
                score = w[row, j : j + pattern[1]] ** 2 / np.diag(upper)[j : j + pattern[1]] ** 2
                keep[row, [j + place for place in first_largest(score, pattern[0])]] = True
            solved[row, j] = w[row, j] if keep[row, j] else 0.0
            if grid:
                scale, zero, bits = grid[0][row], grid[1][row], grid[2]
                solved[row, j] = scale * (nearest(solved[row, j], scale, int(zero), bits) - zero)
            errors[row, j] = (w[row, j] - solved[row, j]) / upper[j, j]
            w[row, j:] -= errors[row, j] * upper[j, j:]
    return solved, errors, keep


BLOCKS = (
    SEEDS, st.sampled_from([1, 7, 9]), st.sampled_from([1, 8, 13, 16, 24]),
    st.sampled_from([None, (1, 2), (2, 4), (5, 8), (3, 3), (1, 1)]), st.sampled_from([None, 1, 4, 8]),
)  # fmt: skip


@pytest.mark.exercise("chapters.pruning.sparsegpt.solve_block", points=3)
@pytest.mark.usefixtures("others_from_the_book")
class TestSolveBlock:
    function = "solve_block"

    @given(*BLOCKS)
    def test_equals_one_weight_after_another(self, seed, rows, columns, pattern, bits):
        weight, upper, mask, grid = block(seed, rows, columns, bits)
        pattern = pattern if pattern and columns % pattern[1] == 0 else None
        asked = (None if pattern else mask, pattern, grid)
        held = weight.copy(), upper.copy(), mask.copy()
        solved, errors, found = solve_block(weight, upper, *asked)
        assert all(np.array_equal(*pair) for pair in zip(held, (weight, upper, mask), strict=True))
        expected = block_by_hand(*held[:2], None if pattern else held[2], *asked[1:])
        np.testing.assert_array_equal(found, expected[2])
        np.testing.assert_allclose(solved, expected[0], **close(columns, *expected[:2]))
        np.testing.assert_allclose(errors, expected[1], **close(columns, *expected[:2]))
        if not bits:
            assert not solved[~found].any()

    @pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 4), (4, 4)])
    def test_of_equal_scores_the_first_stay(self, pattern):
        _, errors, mask = solve_block(np.array([[1.0, -1.0, 1.0, -1.0] * 2]), np.eye(8), pattern=pattern)
        assert mask.tolist() == [[place < pattern[0] for place in range(4)] * 2]
        np.testing.assert_array_equal(errors != 0, ~mask)

    def test_of_zeros_the_first_stay_too(self):
        assert solve_block(np.zeros((1, 4)), np.eye(4), pattern=(1, 2))[2].tolist() == [[True, False] * 2]

    @pytest.mark.parametrize("asked", [{}, {"mask": ONES > 0, "pattern": (2, 4)}])
    def test_wants_a_mask_or_a_pattern(self, asked):
        with pytest.raises(ValueError):
            solve_block(ONES, EYE, **asked)


@pytest.mark.exercise("chapters.pruning.sparsegpt.sparsegpt", points=4)
@pytest.mark.usefixtures("others_from_the_book")
class TestSparsegpt:
    function = "sparsegpt"

    @pytest.mark.parametrize("case", RELEASED)
    def test_equals_the_released_code(self, case):
        arrays = golden("sparse/sparsegpt")
        found = sparsegpt(arrays["W"], arrays["H_fp64"], **RELEASED[case])
        expected = arrays[f"{case}__W_fp64"]
        np.testing.assert_array_equal(found.weight == 0, expected == 0)
        np.testing.assert_array_equal(found.mask, expected != 0)
        np.testing.assert_allclose(found.weight, expected, **tolerance(np.float64, 64))
        assert found.error == pytest.approx(float(arrays[f"{case}__err_fp64"]), rel=1e-12)

    def test_equals_the_released_code_where_inputs_are_dead(self):
        arrays = golden("sparse/sparsegpt")
        x = arrays["X"].astype(np.float64)
        x[..., [5, 40]] = 0
        x = x.reshape(-1, 64)
        found, expected = sparsegpt(arrays["W"], 2 / 6 * x.T @ x), arrays["dead5_40_u50__W_fp64"]
        np.testing.assert_array_equal(found.weight == 0, expected == 0)
        np.testing.assert_allclose(found.weight, expected, **tolerance(np.float64, 64))

    @given(
        layers(), SHARES, st.sampled_from([None, (1, 2), (2, 4), (4, 8), (2, 3)]), st.sampled_from([None, 2, 4]),
        st.booleans(), st.sampled_from([0.01, 0.3]), st.sampled_from([1, 5, 8, 24, 128]),
    )  # fmt: skip
    def test_equals_elimination_column_by_column(self, layer, sparsity, pattern, bits, exact, damping, size):
        columns = layer.weight.shape[1]
        if pattern and (columns % pattern[1] or size % pattern[1]):
            pattern = None
        asked = sparsity, pattern, bits, exact, damping, size
        weight, hessian = layer.weight.copy(), layer.hessian
        held = hessian.copy()
        found, expected = sparsegpt(weight, hessian, *asked), solved_by_hand(layer.weight, held, *asked)
        assert np.array_equal(weight, layer.weight) and np.array_equal(hessian, held)
        np.testing.assert_array_equal(found.mask, expected[1])
        np.testing.assert_allclose(found.weight, expected[0], **close(columns, layer.weight, expected[0]))
        assert found.error == pytest.approx(expected[2], rel=1e-8)
        change = np.where(np.diag(hessian) == 0, 0, weight) - found.weight
        rise = (change @ damped(hessian, damping) * change).sum() / 2
        assert found.error == pytest.approx(rise, rel=1e-6)

    @given(layers(), st.sampled_from([(1, 2), (2, 4)]), st.sampled_from([4, 8, 12]))
    def test_blocks_change_nothing_where_groups_choose(self, layer, pattern, size):
        if layer.weight.shape[1] % pattern[1] == 0:
            whole, parts = (sparsegpt(layer.weight, layer.hessian, 0.9, pattern, block_size=b) for b in (128, size))
            np.testing.assert_array_equal(whole.mask, parts.mask)
            np.testing.assert_allclose(whole.weight, parts.weight, **close(24, layer.weight, whole.weight))

    def test_grids_see_dead_columns_and_what_is_kept_may_round_to_zero(self):
        weight, hessian = np.array([[9.0, 1.2, -1.2, 0.1]]), np.diag([0.0, 1.0, 1.0, 9.0])
        step = 10.2 / 15
        found, all_kept = sparsegpt(weight, hessian, bits=4, exact=True), sparsegpt(weight, hessian, 0, (4, 4), bits=4)
        assert found.mask.tolist() == [[False, True, True, False]] and all_kept.mask.all()
        for each in (found, all_kept):
            np.testing.assert_allclose(each.weight, [[0, 2 * step, -2 * step, 0]])

    def test_a_share_counts_in_each_block(self):
        rng = np.random.default_rng(0)
        weight, x = rng.standard_normal((6, 40)), rng.standard_normal((99, 40))
        for exact, zeros in ((False, (49, 25)), (True, (48, 24))):
            mask = sparsegpt(weight, x.T @ x, 0.5, exact=exact, block_size=16).mask
            assert [int((~part).sum()) for part in np.split(mask, [16, 32], axis=1)] == [zeros[0], zeros[0], zeros[1]]

    @pytest.mark.parametrize(
        "bad",
        [
            {"sparsity": 1.0}, {"sparsity": NAN}, {"sparsity": -0.1}, {"pattern": (5, 4)}, {"pattern": (0, 4)},
            {"pattern": (1, 3)}, {"pattern": (2, 4), "block_size": 6}, {"block_size": 0}, {"bits": 0}, {"bits": 9},
            {"damping": -1}, {"damping": NAN}, {"weight": ONES * NAN}, {"weight": ONES[0]}, {"weight": ONES[:0]},
            {"hessian": np.eye(3)}, {"hessian": EYE * NAN}, {"hessian": np.tri(4)}, {"hessian": -EYE},
        ],
    )  # fmt: skip
    def test_refuses(self, bad):
        with pytest.raises(ValueError):
            sparsegpt(**({"weight": ONES, "hessian": EYE} | bad))


# --- the kernel on a block --------------------------------------------------------------------------------------------


def tensors(weight, upper, mask, grid, dtype=torch.float64, aligned=True):
    """What the kernel takes, in poisoned buffers."""
    held = [poisoned(torch.from_numpy(part).to(DEVICE, dtype), aligned) for part in (weight, upper)]
    masked = None if mask is None else poisoned(torch.from_numpy(mask).to(DEVICE), aligned)
    if grid:
        scale, zero = (poisoned(torch.from_numpy(part).to(DEVICE, dtype), aligned) for part in grid[:2])
        grid = scale, zero, grid[2]
    return *held, masked, grid


@pytest.mark.kernel
@pytest.mark.exercise("kernels.pruning.sparsegpt.solve_kernel", points=4)
class TestSolveKernel:
    @pytest.mark.parametrize(("pattern", "bits"), [(None, None), (None, 3), ((2, 4), None), ((5, 8), 4)])
    @settings(max_examples=3)  # the interpreter is slow
    @given(SEEDS, st.sampled_from([1, 5]), st.sampled_from([1, 2, 3]), st.sampled_from([torch.float32, torch.float64]),
           st.booleans())  # fmt: skip
    def test_equals_the_definition(self, pattern, bits, seed, rows, size, dtype, aligned):
        columns = 8 * min(size, 2) if pattern else (1, 13, 17)[size - 1]
        weight, upper, mask, grid = block(seed, rows, columns, bits)
        if dtype is torch.float32:  # what it is given, exactly
            weight, upper = (part.astype(np.float32).astype(float) for part in (weight, upper))
            upper = np.diag(np.diag(upper)) if bits else upper  # no sum is rounded near the middle of two codes
        mine = tensors(weight, upper, None if pattern else mask, grid, dtype, aligned)
        before = mine[0].clone()
        solved, errors, found = fast.solve_block(*mine[:3], pattern, mine[3], block_n=4)
        expected = block_by_hand(weight, upper, None if pattern else mask, pattern, grid)
        assert solved.dtype is errors.dtype is dtype and found.dtype is torch.bool and torch.equal(mine[0], before)
        np.testing.assert_array_equal(found.cpu().numpy(), expected[2])
        near = tolerance(dtype, columns, 10 * max(1, np.abs(expected[:2]).max()))
        np.testing.assert_allclose(solved.cpu().numpy(), expected[0], **near)
        np.testing.assert_allclose(errors.cpu().numpy(), expected[1], **near)

    @pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 8)])
    def test_of_equal_scores_the_first_stay(self, pattern):
        weight = torch.tensor([[1.0, -1.0, 1.0, -1.0] * 2, [0.0] * 8, [1e30, -1e30, 2e30, 0] * 2], device=DEVICE)
        found = fast.solve_block(weight, torch.eye(8, device=DEVICE), pattern=pattern)[2].cpu().numpy()
        for row, mask in zip(weight.abs().cpu().numpy(), found, strict=True):
            for start in range(0, 8, pattern[1]):
                group = slice(start, start + pattern[1])
                assert np.flatnonzero(mask[group]).tolist() == first_largest(row[group], pattern[0])

    def test_takes_parts_of_wider_matrices(self):
        weight, upper, mask, _ = block(1, 5, 13, None)
        wide = [torch.full((len(part), 40), NAN, dtype=torch.float64, device=DEVICE) for part in (weight, upper)]
        for whole, part in zip(wide, (weight, upper), strict=True):
            whole[:, 9:22] = torch.from_numpy(part)
        found = fast.solve_block(*(whole[:, 9:22] for whole in wide), torch.from_numpy(mask).to(DEVICE), block_n=4)
        expected = block_by_hand(weight, upper, mask)[1]
        near = tolerance(np.float64, 13, 10 * np.abs(expected).max())
        np.testing.assert_allclose(found[1].cpu().numpy(), expected, **near)

    def test_of_two_codes_as_near_the_even_step_is_taken(self):
        weight, one = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]], device=DEVICE), torch.ones(1, device=DEVICE)
        found = fast.solve_block(weight, torch.eye(5, device=DEVICE), weight != 0, None, (one, 3 * one, 3))
        assert found[0].tolist() == [[0, 2, 2, 0, -2]]

    @pytest.mark.parametrize("begins", [False, True])
    def test_loads_nothing_outside_of_its_inputs(self, begins):
        weight, upper, mask, grid = block(7, 5, 13, 3)
        held = [walled(torch.from_numpy(part).to(DEVICE), begins) for part in (weight, upper, mask, *grid[:2])]
        errors = fast.solve_block(*held[:3], None, (*held[3:], 3), block_n=4)[1].cpu().numpy()
        expected = block_by_hand(weight, upper, mask, None, grid)[1]
        np.testing.assert_allclose(errors, expected, **tolerance(np.float64, 13, 10 * np.abs(expected).max()))
