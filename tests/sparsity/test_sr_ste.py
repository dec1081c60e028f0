"""SR-STE: masks, refined gradients and steps against loops, autograd and the authors' arrays; the kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.sparsity import sr_ste
from tests.conftest import DEVICE, HAS_TRITON, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.sparsity.drawn import CONTENTS, SEEDS, contents

fast = kernel("sparsity.sr_ste")

MASK = pytest.mark.exercise("chapters.sparsity.sr_ste.sparse_mask", points=1)
GRADIENT = pytest.mark.exercise("chapters.sparsity.sr_ste.refined_gradient", points=2)
STEP = pytest.mark.exercise("chapters.sparsity.sr_ste.refined_step", points=2)
DIVERGENCE = pytest.mark.exercise("chapters.sparsity.sr_ste.architecture_divergence", points=1)
KEPT = pytest.mark.exercise("kernels.sparsity.sr_ste.kept", points=3)
KERNEL = pytest.mark.exercise("kernels.sparsity.sr_ste.step_kernel", points=3)

PATTERNS = st.sampled_from([(1, 1), (2, 4), (1, 4), (3, 4), (4, 4), (4, 8), (2, 8), (3, 7), (1, 2)])
KINDS = st.sampled_from([kind for kind in CONTENTS if kind != "huge"])
ROWS, COUNTS = st.integers(1, 5), st.sampled_from([1, 2, 7])
DECAYS = st.sampled_from([0.0, 2e-4, 0.05, 1.0, 3.0])
FEW = settings(max_examples=10)
ONES = np.ones((2, 8))
BAD = {"n=0": {"n": 0}, "n=5": {"n": 5}, "8 columns.*m=3": {"n": 1, "m": 3}}


def drawn(kind: str, rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and a gradient, float16-valued float64."""
    return contents(kind, (rows, columns), seed), contents("normal", (rows, columns), seed + 1)


def mask_by_hand(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    """One group at a time: the last n of the positions, ordered by magnitude, of equals by index."""
    mask = np.zeros(weight.shape, dtype=bool)
    for row in range(len(weight)):
        for first in range(0, weight.shape[1], m):
            order = sorted(range(first, first + m), key=lambda at: (abs(weight[row, at]), at))
            mask[row, order[m - n :]] = True
    return mask


def refined_by_hand(weight: np.ndarray, gradient: np.ndarray, n: int, m: int, decay: float) -> np.ndarray:
    found, mask = gradient.copy(), mask_by_hand(weight, n, m)
    for at in zip(*np.nonzero(~mask), strict=True):
        found[at] = gradient[at] + decay * weight[at]
    return found


def refuses(function, *extra: object) -> None:
    """Patterns that do not fit, and weights that are no finite matrix."""
    for bad in BAD.values():
        with pytest.raises(ValueError):
            function(ONES, *extra, **bad)
    for weight in (ONES * np.nan, ONES * -np.inf, np.ones(8), np.ones((0, 8))):
        with pytest.raises(ValueError):
            function(weight, *(np.ones(weight.shape) for _ in extra))


@MASK
class TestSparseMask:
    @given(KINDS, ROWS, COUNTS, PATTERNS, SEEDS)
    def test_keeps_the_largest_of_each_group_and_of_equals_the_later(self, kind, rows, groups, pattern, seed):
        n, m = pattern
        weight = contents(kind, (rows, groups * m), seed)
        before = weight.copy()
        mask = sr_ste.sparse_mask(weight, n, m)
        assert mask.dtype == bool and mask.flags.c_contiguous
        np.testing.assert_array_equal(mask, mask_by_hand(weight, n, m))
        np.testing.assert_array_equal(weight, before)

    @pytest.mark.parametrize(("case", "m"), [("keep2of4", 4), ("conv2of4", 4)])
    def test_equals_the_released_code(self, case, m):
        arrays = golden("sparse/sr_ste")
        weight, forward = arrays[f"srste_{case}__w"], arrays[f"srste_{case}__forward"]
        if weight.ndim == 4:  # convolutions are grouped along their input channels
            weight, forward = (np.moveaxis(each, 1, -1).reshape(-1, each.shape[1]) for each in (weight, forward))
        np.testing.assert_array_equal(sr_ste.sparse_mask(weight, 2, m), forward != 0)

    @given(SEEDS, st.sampled_from([(1, 4), (2, 4), (4, 8), (5, 16)]))
    def test_breaks_ties_as_the_sort_of_the_released_code(self, seed, pattern):
        n, m = pattern
        weight = contents("ties", (3, 2 * m), seed)
        groups = torch.from_numpy(weight).abs().view(-1, m)
        first = torch.argsort(groups, dim=1, stable=True)[:, : m - n]
        expected = torch.ones_like(groups).scatter_(1, first, 0).view(3, -1)
        np.testing.assert_array_equal(sr_ste.sparse_mask(weight, n, m), expected.numpy() != 0)

    def test_is_exact_and_refuses(self):
        assert sr_ste.sparse_mask(np.array([[1 + 2**-52, -1.0, 0.0, 1.0]]), 1).tolist() == [[True, False, False, False]]
        assert sr_ste.sparse_mask(np.zeros((1, 4))).tolist() == [[False, False, True, True]]
        refuses(sr_ste.sparse_mask)


@GRADIENT
class TestRefinedGradient:
    @given(KINDS, ROWS, COUNTS, PATTERNS, DECAYS, SEEDS)
    def test_decays_what_is_dropped_and_nothing_else(self, kind, rows, groups, pattern, decay, seed):
        weight, gradient = drawn(kind, rows, groups * pattern[1], seed)
        mine = weight.copy(), gradient.copy()
        found = sr_ste.refined_gradient(*mine, *pattern, decay)
        np.testing.assert_allclose(found, refined_by_hand(weight, gradient, *pattern, decay), **tolerance(np.float64))
        np.testing.assert_array_equal(mine, (weight, gradient))

    @pytest.mark.parametrize("decay", ["2e-4", "0.1"])
    def test_equals_the_released_code(self, decay):
        arrays = {
            name: golden("sparse/sr_ste")[f"srste_keep2of4__{name}"]
            for name in ("w", "grad_out", f"grad_w_decay{decay}")
        }
        found = sr_ste.refined_gradient(arrays["w"], arrays["grad_out"], 2, 4, float(decay))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, arrays[f"grad_w_decay{decay}"])

    def test_equals_the_released_code_on_input_channels(self):
        names = ("w", "grad_out", "grad_w_decay0.05")
        held = [np.moveaxis(golden("sparse/sr_ste")[f"srste_conv2of4__{name}"], 1, -1).reshape(-1, 8) for name in names]
        np.testing.assert_array_equal(sr_ste.refined_gradient(held[0], held[1], 2, 4, 0.05), held[2])

    def test_is_the_released_factor_and_2_of_4_by_default(self):
        weight, gradient = drawn("normal", 3, 8, 0)
        expected = refined_by_hand(weight, gradient, 2, 4, 2e-4)
        np.testing.assert_allclose(sr_ste.refined_gradient(weight, gradient), expected, **tolerance(np.float64))

    @given(SEEDS, PATTERNS)
    def test_lowers_the_loss_and_the_size_of_what_is_dropped(self, seed, pattern):
        """It is the gradient of L(E ⊙ W) + λ/2 ‖(1 − E) ⊙ W‖², E held: a step against it shrinks the second term."""
        weight, _ = drawn("normal", 2, 2 * pattern[1], seed)
        dropped = ~mask_by_hand(weight, *pattern)
        moved = weight - 0.5 * sr_ste.refined_gradient(weight, np.zeros_like(weight), *pattern, 0.5)
        np.testing.assert_allclose(moved, np.where(dropped, 0.75 * weight, weight), **tolerance(np.float64))

    @pytest.mark.parametrize(("dtype", "other"), [("f2", "f2"), ("f2", "f4"), ("f4", "f2"), ("f8", "f4")])
    def test_has_the_dtype_of_the_weight_and_adds_in_the_wider_one(self, dtype, other):
        weight, gradient = np.array([[2.0, 1.0]], dtype=dtype), np.array([[0.0, 2048.0]], dtype=other)
        found = sr_ste.refined_gradient(weight, gradient, 1, 2, 3.0)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.array([[0.0, 2051.0]]).astype(dtype))  # float16: 2052

    def test_adds_in_the_dtype_of_a_wider_gradient(self):
        weight, gradient = np.array([[1, 2.0**-40]], np.float32), np.array([[0, 1 + 2.0**-24]])  # a tie in float32
        found = sr_ste.refined_gradient(weight, gradient, 1, 2, 1.0)
        np.testing.assert_array_equal(found, np.array([[0, 1 + 2.0**-23]], np.float32))

    def test_refuses(self):
        refuses(sr_ste.refined_gradient, ONES)
        for gradient in (np.ones((8, 2)), np.ones((1, 8)), ONES * np.nan, ONES * np.inf):
            with pytest.raises(ValueError):
                sr_ste.refined_gradient(ONES, gradient)
        for decay in (-1e-4, np.nan, np.inf):
            with pytest.raises(ValueError):
                sr_ste.refined_gradient(ONES, ONES, decay=decay)


@STEP
class TestRefinedStep:
    @given(KINDS, ROWS, COUNTS, PATTERNS, DECAYS, st.sampled_from([0.0, 0.1, 1.0]), SEEDS)
    def test_is_a_step_by_the_old_mask_and_then_the_new_mask(self, kind, rows, groups, pattern, decay, rate, seed):
        weight, gradient = drawn(kind, rows, groups * pattern[1], seed)
        mine = weight.copy(), gradient.copy()
        moved, sparse = sr_ste.refined_step(*mine, *pattern, rate, decay)
        expected = weight - rate * refined_by_hand(weight, gradient, *pattern, decay)
        np.testing.assert_allclose(moved, expected, **tolerance(np.float64, scale=max(1, np.abs(weight).max())))
        np.testing.assert_array_equal(sparse, np.where(mask_by_hand(moved, *pattern), moved, 0))
        np.testing.assert_array_equal(mine, (weight, gradient))

    @FEW
    @given(SEEDS, PATTERNS, st.sampled_from([0.0, 0.01, 0.5]))
    def test_steps_are_those_of_torch(self, seed, pattern, decay):
        """Least squares: autograd through the masked weight, SGD on the dense one."""
        n, m = pattern
        generator = np.random.default_rng(seed)
        x, y, weight = (generator.normal(size=size) for size in ((9, 2 * m), (9, 3), (3, 2 * m)))
        dense = torch.nn.Parameter(torch.from_numpy(weight.copy()))
        optimizer = torch.optim.SGD([dense], lr=0.05)
        for _ in range(4):
            used = torch.from_numpy(np.where(mask_by_hand(weight, n, m), weight, 0)).requires_grad_()
            torch.nn.functional.mse_loss(torch.from_numpy(x) @ used.T, torch.from_numpy(y)).backward()
            dense.grad = used.grad + decay * (dense.detach() - used.detach())
            optimizer.step()
            weight, sparse = sr_ste.refined_step(weight, used.grad.numpy(), n, m, 0.05, decay)
            np.testing.assert_allclose(weight, dense.detach().numpy(), **tolerance(np.float64, 9))
            np.testing.assert_array_equal(sparse, np.where(mask_by_hand(weight, n, m), weight, 0))

    def test_a_dropped_weight_comes_back_and_the_decay_keeps_it_away(self):
        weight, gradient = np.array([[1.0, 0.9]]), np.array([[0.0, -0.2]])
        assert sr_ste.refined_step(weight, gradient, 1, 2, 1.0, 0.0)[1].tolist() == [[0, 1.1]]
        assert sr_ste.refined_step(weight, gradient, 1, 2, 1.0, 0.2)[1].tolist() == [[1, 0]]

    @pytest.mark.parametrize(("dtype", "other"), [("f4", "f2"), ("f2", "f2"), ("f8", "f4"), ("f2", "f4")])
    def test_the_weight_keeps_its_dtype_and_the_sparse_one_has_that_of_the_gradient(self, dtype, other):
        weight, gradient = np.array([[1, 1 + 2**-9, 4]], dtype), np.array([[0, 2**-9, 2.0**-12]], other)
        moved, sparse = sr_ste.refined_step(weight, gradient, 1, 3, 1.0, 0.0)
        assert moved.dtype == dtype and sparse.dtype == other
        exact = np.array([[1, 1, 4 - 2.0**-12]])
        np.testing.assert_array_equal(moved, exact.astype(dtype))
        np.testing.assert_array_equal(sparse, np.array([[0, 0, exact[0, 2]]]).astype(dtype).astype(other))
        assert not np.signbit(sparse).any()

    def test_is_2_of_4_at_a_rate_of_a_tenth_with_the_released_factor_by_default(self):
        weight, gradient = drawn("normal", 3, 8, 0)
        moved, sparse = sr_ste.refined_step(weight, gradient)
        expected = weight - 0.1 * refined_by_hand(weight, gradient, 2, 4, 2e-4)
        np.testing.assert_allclose(moved, expected, **tolerance(np.float64))
        np.testing.assert_array_equal(sparse, np.where(mask_by_hand(moved, 2, 4), moved, 0))

    @pytest.mark.parametrize(("dtype", "other"), [("f4", "f4"), ("f4", "f8"), ("f8", "f4"), ("f2", "f4"), ("f2", "f2")])
    def test_computes_in_the_wider_dtype_and_no_wider(self, dtype, other):
        generator = np.random.default_rng(0)
        weight, gradient = generator.normal(size=(64, 8)).astype(dtype), generator.normal(size=(64, 8)).astype(other)
        wide = np.result_type(weight, gradient, np.float32)
        w, g = weight.astype(wide), gradient.astype(wide)
        change = g + 0.3 * np.where(mask_by_hand(weight, 2, 4), 0, w).astype(wide)
        moved, _ = sr_ste.refined_step(weight, gradient, 2, 4, 0.7, 0.3)
        np.testing.assert_array_equal(moved, (w - 0.7 * change).astype(dtype))

    def test_is_rounded_once_and_chooses_after_that(self):
        weight, gradient = np.array([[1, 1 - 2**-11]], np.float16), np.array([[0, -(2.0**-11) + 2.0**-13]], np.float16)
        moved, sparse = sr_ste.refined_step(weight, gradient, 1, 2, 1.0, 0.0)
        assert moved.tolist() == [[1, 1]] and sparse.tolist() == [[0, 1]]
        negative = sr_ste.refined_step(-np.ones((1, 2)), np.zeros((1, 2)), 1, 2, 0.1, 0.5)
        assert negative[0].tolist() == [[-0.95, -1]] and not np.signbit(negative[1][0, 0])

    def test_refuses(self):
        refuses(sr_ste.refined_step, ONES)
        for gradient in (np.ones((8, 2)), ONES * np.nan):
            with pytest.raises(ValueError):
                sr_ste.refined_step(ONES, gradient)
        for bad in ({"decay": -1e-4}, {"decay": np.nan}, {"rate": -0.1}, {"rate": np.inf}, {"rate": np.nan}):
            with pytest.raises(ValueError):
                sr_ste.refined_step(ONES, ONES, **bad)


@DIVERGENCE
class TestArchitectureDivergence:
    @given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4), SEEDS)
    def test_counts_entries_that_differ_in_either_direction(self, shapes, seed):
        generator = np.random.default_rng(seed)
        before, after = ([generator.random(shape) < 0.5 for shape in shapes] for _ in range(2))
        expected = sum(int(a.flat[i] != b.flat[i]) for a, b in zip(before, after, strict=True) for i in range(a.size))
        assert sr_ste.architecture_divergence(before, after) == expected
        assert sr_ste.architecture_divergence(after, before) == expected
        assert sr_ste.architecture_divergence(before, before) == 0

    def test_two_that_trade_places_count_two_and_layers_of_hundreds_are_counted(self):
        here, there = np.array([[True, False]]), np.array([[False, True]])
        found = sr_ste.architecture_divergence([here, np.ones((30, 40), bool)], [there, np.zeros((30, 40), bool)])
        assert found == 1202 and isinstance(found, int)

    def test_refuses(self):
        mask = np.ones((2, 4), bool)
        for before, after in (([], []), ([mask], []), ([mask], [mask, mask]), ([mask], [mask[:1]]), ([mask], [mask.T])):
            with pytest.raises(ValueError):
                sr_ste.architecture_divergence(before, after)
        for wrong in (mask.astype(int), mask.astype(float)):
            with pytest.raises(TypeError):
                sr_ste.architecture_divergence([mask], [wrong])
            with pytest.raises(TypeError):
                sr_ste.architecture_divergence([wrong], [mask])


# --- the kernels -----------------------------------------------------------------------------------------------------

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def kept_of_groups(key, out, N: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr):
        offsets = tl.arange(0, ROWS)[:, None] * M + tl.arange(0, M)[None, :]
        tl.store(out + offsets, fast.kept(tl.load(key + offsets), N, M).to(tl.int8))


@KEPT
@pytest.mark.kernel
@pytest.mark.parametrize(
    ("rows", "n", "m"), [(4, 1, 1), (8, 1, 2), (1, 2, 4), (8, 3, 4), (8, 4, 4), (4, 4, 8), (2, 5, 16)]
)
def test_kernel_keeps_exactly_n_and_of_equals_the_later(rows, n, m):
    generator = np.random.default_rng(m)
    for _ in range(2):
        for high in (1, 3, 2**31):
            key = generator.integers(0, high, (rows, m))
            out = torch.empty(rows, m, dtype=torch.int8, device=DEVICE)
            kept_of_groups[(1,)](torch.from_numpy(key.astype(np.int32)).to(DEVICE), out, N=n, M=m, ROWS=rows)
            np.testing.assert_array_equal(out.cpu().numpy().astype(bool), mask_by_hand(key, n, m))


def launched(weight: torch.Tensor, gradient: torch.Tensor, n: int, m: int, rate: float, decay: float, aligned: bool):
    """What `step_kernel` writes, launched on its own: (moved, sparse)."""
    weight, gradient = (poisoned(each.to(DEVICE), aligned) for each in (weight, gradient))
    moved, sparse = torch.empty_like(weight), torch.empty_like(gradient)
    grid, block = (triton.cdiv(weight.numel(), 64),), {"N": n, "M": m, "BLOCK": 64}
    fast.step_kernel[grid](weight, gradient, moved, sparse, weight.numel(), rate, decay, **block, num_warps=1)
    return moved.cpu(), sparse.cpu()


@KERNEL
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@FEW
@given(
    KINDS, st.sampled_from([(1, 8), (3, 40), (7, 24)]), st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 1), (2, 2)]),
    DECAYS, SEEDS, st.booleans(),
)  # fmt: skip
def test_kernel_steps_like_the_reference(dtype, kind, shape, pattern, decay, seed, aligned):
    weight, gradient = (torch.from_numpy(each).to(dtype) for each in drawn(kind, *shape, seed))
    moved, sparse = launched(weight, gradient, *pattern, 0.1, decay, aligned)
    expected, _ = oracle("sparsity.sr_ste").refined_step(weight.numpy(), gradient.numpy(), *pattern, 0.1, decay)
    close = tolerance(dtype, scale=max(1, np.abs(expected).max()))
    np.testing.assert_allclose(moved.numpy(), expected, **close)
    kept = mask_by_hand(moved.double().numpy(), *pattern)  # of what it stored: near ties may round another way
    np.testing.assert_array_equal(sparse.numpy(), np.where(kept, moved.numpy(), 0))


@KERNEL
@pytest.mark.kernel
def test_kernel_takes_float32_weights_with_float16_gradients():
    weight, gradient = (torch.from_numpy(each) for each in drawn("normal", 5, 24, 3))
    moved, sparse = launched(weight.float(), gradient.half(), 2, 4, 1e-4, 0.5, True)
    book = oracle("sparsity.sr_ste").refined_step
    expected, kept = book(weight.float().numpy(), gradient.half().numpy(), 2, 4, 1e-4, 0.5)
    assert (moved.dtype, sparse.dtype) == (torch.float32, torch.float16)
    np.testing.assert_allclose(moved.numpy(), expected, **tolerance(torch.float32))
    np.testing.assert_allclose(sparse.numpy(), kept, **tolerance(torch.float16))


@KERNEL
@pytest.mark.kernel
def test_kernel_rounds_before_it_chooses_and_what_it_drops_is_positive_zero():
    weight = torch.tensor([[1, 1 - 2**-11, -3.0, -3.0]], dtype=torch.float16)
    gradient = torch.tensor([[0, -(2.0**-11) + 2.0**-13, 0, 0]], dtype=torch.float16)
    moved, sparse = launched(weight, gradient, 1, 2, 1.0, 0.0, True)
    assert moved.tolist() == [[1, 1, -3, -3]] and sparse.tolist() == [[0, 1, 0, -3]]
    assert not sparse[0, [0, 2]].signbit().any()
