"""Mixed precision: curvature against dense Hessians and the authors' arrays, bits against brute force, the kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.quantization import mixed_precision
from chapters.quantization.mixed_precision import (
    assign_bits,
    hutchinson,
    power_iteration,
    released_eigenvalue,
    spread_sensitivity,
)
from tests.conftest import KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.minitfm.models import tiny_model, tokens
from tests.quantization.widths import GROUPS, SEEDS, drawn, on_device, weights_of

kernels = kernel("quantization.mixed_precision")
SIZES = st.sampled_from([1, 2, 3, 7, 17])
WIDTHS = st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, max_size=4)


def symmetric(seed: int, eigenvalues: list[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with these eigenvalues, and its eigenvectors as columns, in their order."""
    size = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return basis * eigenvalues @ basis.T, basis


def spectrum(seed: int, size: int) -> np.ndarray:
    """The first is the largest in magnitude, of either sign; there are zeros and equals among the others."""
    rng = np.random.default_rng(seed)
    others = rng.choice([0.0, 0.5, -0.5, *rng.uniform(-0.8, 0.8, 4)], size - 1)
    return np.array([rng.choice([-1.0, 1.0]), *others]) * rng.choice([1e-6, 1.0, 1e6])


class Counted:
    """A matrix as a product that remembers the vectors."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix, self.seen = matrix, []

    def __call__(self, v: np.ndarray) -> np.ndarray:
        self.seen.append(v.copy())
        return self.matrix @ v


def network(held: dict[str, np.ndarray], names: list[str]) -> Callable[[np.ndarray], np.ndarray]:
    """The product with the Hessian of the golden network by the parameters `names`, all of them one vector."""
    parts = {name: torch.from_numpy(held[name]) for name in ("W0", "b0", "W1", "b1", "W2", "b2")}
    flat = torch.cat([parts[name].flatten() for name in names]).requires_grad_()
    pieces = flat.split([parts[name].numel() for name in names])
    parts |= {name: piece.view_as(parts[name]) for name, piece in zip(names, pieces, strict=True)}
    x = torch.tanh(torch.from_numpy(held["x"]) @ parts["W0"].T + parts["b0"])
    x = torch.tanh(x @ parts["W1"].T + parts["b1"]) @ parts["W2"].T + parts["b2"]
    (gradient,) = torch.autograd.grad(F.cross_entropy(x, torch.from_numpy(held["y"])), flat, create_graph=True)
    return lambda v: mixed_precision.hessian_product(gradient, flat, v)


GOLDEN = {"full": ["W0", "b0", "W1", "b1", "W2", "b2"], "layer0": ["W0"], "layer2": ["W2"]}


def dense(product: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    return np.stack([product(unit) for unit in np.eye(size)])


@pytest.mark.exercise("chapters.quantization.mixed_precision.power_iteration", points=3)
class TestPowerIteration:
    @given(SEEDS, SIZES)
    def test_finds_the_largest_magnitude_with_its_sign(self, seed, size):
        eigenvalues = spectrum(seed, size)
        matrix, basis = symmetric(seed, eigenvalues)
        start = np.random.default_rng(seed).standard_normal(size) * 1e3
        before = start.copy()
        value, v, residual = power_iteration(Counted(matrix), start, tolerance=1e-6)
        assert value == pytest.approx(eigenvalues[0], rel=1e-9)
        assert abs(v @ basis[:, 0]) == pytest.approx(1, rel=1e-9) and residual <= 1e-6
        np.testing.assert_array_equal(start, before)

    @given(SEEDS, st.sampled_from([1.0, -1.0]))
    def test_does_not_stop_on_a_plateau(self, seed, sign):
        matrix, _ = symmetric(seed, sign * np.array([1, -0.98, 0.3, 0.2, 0]))
        value, _, _ = power_iteration(Counted(matrix), np.random.default_rng(seed).standard_normal(5))
        assert value == pytest.approx(sign, rel=1e-5)

    @given(SEEDS, st.integers(1, 6))
    def test_what_it_returns_belongs_together_wherever_it_ends(self, seed, limit):
        matrix, _ = symmetric(seed, np.array([1, -0.99, 0.98, 0.5]))
        counted = Counted(matrix)
        value, v, residual = power_iteration(counted, np.ones(4), tolerance=1e-9, limit=limit)
        assert len(counted.seen) == limit and np.linalg.norm(v) == pytest.approx(1, rel=1e-12)
        assert value == pytest.approx(v @ matrix @ v, rel=1e-9)
        turned = matrix @ v
        assert residual == pytest.approx(np.linalg.norm(turned - value * v) / np.linalg.norm(turned), rel=1e-6)

    @given(SEEDS)
    def test_finds_the_others_beside_known_ones(self, seed):
        eigenvalues = np.array([-2, 1.2, 0.7, 0.1])
        matrix, basis = symmetric(seed, eigenvalues)
        for count in range(3):
            known, start = list(basis.T[:count]), np.random.default_rng(seed).standard_normal(4)
            value, v, _ = power_iteration(Counted(matrix), start, known, tolerance=1e-7)
            assert value == pytest.approx(eigenvalues[count], rel=1e-9)
            np.testing.assert_allclose(basis.T[:count] @ v, 0, **tolerance(np.float64))

    def test_ends_where_it_says(self):
        turning = Counted(np.array([[0.0, 1], [1, 0]]))  # takes [1, 0] to [0, 1] and back
        power_iteration(turning, np.array([3.0, 0]))
        assert len(turning.seen) == 10_000, "the default of limit"
        turning.seen.clear()
        assert power_iteration(turning, np.array([3.0, 0]), tolerance=1.0)[2] == 1 == len(turning.seen)
        matrix, _ = symmetric(0, np.array([1, 0.97, 0.3]))
        counted, told = Counted(matrix), Counted(matrix)
        residual = power_iteration(counted, np.ones(3))[2]
        assert residual == power_iteration(told, np.ones(3), tolerance=1e-3)[2] <= 1e-3
        assert len(counted.seen) == len(told.seen) > 9

    def test_a_flat_loss_has_none(self):
        value, v, residual = power_iteration(Counted(np.zeros((3, 3))), np.full(3, 2.0))
        assert (value, residual) == (0, 0) and np.linalg.norm(v) == pytest.approx(1)

    @pytest.mark.parametrize("part", GOLDEN)
    def test_finds_what_the_dense_hessian_has(self, part):
        held, known = golden("quant/hawq"), []
        product = network(held, GOLDEN[part])
        size = sum(held[name].size for name in GOLDEN[part])
        for expected in held[f"{part}/peer_top{3 if part == 'full' else 2}"]:
            value, v, _ = power_iteration(product, np.random.default_rng(0).standard_normal(size), known)
            assert value == pytest.approx(expected, rel=1e-4)
            known.append(v)

    @pytest.mark.parametrize(
        ("start", "known", "matrix", "limit"),
        [
            (np.zeros(2), [], np.eye(2), 9),
            (np.array([1, np.nan]), [], np.eye(2), 9),
            (np.array([1, np.inf]), [], np.eye(2), 9),
            (np.ones(2), [], np.full((2, 2), np.inf), 9),
            (np.array([3.0, 0]), [np.array([1.0, 0])], np.eye(2), 9),
            (np.ones(2), [], np.full((2, 2), np.nan), 9),
            (np.ones(2), [], np.eye(2), 0),
        ],
    )
    def test_refuses_what_has_no_direction(self, start, known, matrix, limit):
        with pytest.raises(ValueError):
            power_iteration(Counted(matrix), start, known, limit=limit)


def test_the_released_rule_stops_on_a_plateau():
    held = golden("quant/hawq")
    top = held["full/peer_top3"][0]
    assert abs(held["full/peer_top1_default_tol1e-3"][0]) < 0.6 * abs(top), "so did the release itself"
    product, starts = network(held, GOLDEN["full"]), np.random.default_rng(1).standard_normal((8, 155))
    found = [released_eigenvalue(product, start) for start in starts]
    wrong = [value for value in found if abs(value - top) > 0.1 * abs(top)]
    assert wrong and all(power_iteration(product, start)[0] == pytest.approx(top, rel=1e-4) for start in starts[:2])


@pytest.mark.exercise("chapters.quantization.mixed_precision.hutchinson", points=2)
class TestHutchinson:
    @given(SEEDS, SIZES, st.integers(1, 5))
    def test_a_diagonal_is_known_from_any_probe(self, seed, size, probes):
        diagonal = np.random.default_rng(seed).standard_normal(size)
        found = hutchinson(lambda v: diagonal * v, size, probes, seed)
        np.testing.assert_allclose(found, np.full(probes, diagonal.sum()), **tolerance(np.float64, size))

    @given(SEEDS, st.sampled_from([2, 5, 13]))
    def test_mean_and_variance_are_those_of_random_signs(self, seed, size):
        matrix, _ = symmetric(seed, spectrum(seed, size))
        found = hutchinson(Counted(matrix), size, 2000, seed)
        variance = 2 * ((matrix**2).sum() - (np.diag(matrix) ** 2).sum())
        assert abs(found.mean() - np.trace(matrix)) <= 6 * np.sqrt(variance / 2000)
        assert found.var() == pytest.approx(variance, rel=0.35)

    @given(SEEDS, SIZES)
    def test_probes_are_signs_of_their_own(self, seed, size):
        counted = Counted(np.eye(size))
        hutchinson(counted, size, 40, seed)
        seen = np.array(counted.seen)
        assert seen.shape == (40, size) and (np.abs(seen) == 1).all() and len(np.unique(seen, axis=0)) > 1
        hutchinson(counted, size, 40, seed)
        np.testing.assert_array_equal(counted.seen[40:], seen, err_msg="the same seed, the same probes")

    @pytest.mark.parametrize("part", GOLDEN)
    def test_finds_the_trace_of_the_golden_network(self, part):
        held = golden("quant/hawq")
        size = sum(held[name].size for name in GOLDEN[part])
        matrix = dense(network(held, GOLDEN[part]), size)
        assert np.trace(matrix) == pytest.approx(held[f"{part}/exact_trace"], rel=1e-9)
        found = hutchinson(Counted(matrix), size, 2000)
        np.testing.assert_array_equal(found, hutchinson(Counted(matrix), size, 2000, 0), err_msg="seed 0 unless told")
        assert abs(found.mean() - np.trace(matrix)) < 5 * found.std() / np.sqrt(2000)

    @pytest.mark.parametrize(("size", "probes"), [(0, 1), (3, 0), (3, -1)])
    def test_refuses_what_has_no_estimate(self, size, probes):
        with pytest.raises(ValueError):
            hutchinson(lambda v: v, size, probes)


@pytest.mark.exercise("chapters.quantization.mixed_precision.spread_sensitivity", points=1)
class TestSpread:
    def test_equals_q_bert_on_the_golden_network(self):
        held = golden("quant/hawq")
        shards = np.stack([held[f"layer{layer}/peer_batch_top1"] for layer in (0, 2)], axis=1)
        expected = held["qbert_omega_absmean_plus_std"][[0, 2]]
        np.testing.assert_allclose(spread_sensitivity(shards), expected, rtol=1e-12)

    @given(SEEDS, st.integers(1, 5), st.integers(1, 4))
    def test_is_that_of_each_layer(self, seed, shards, layers):
        x = np.random.default_rng(seed).standard_normal((shards, layers))
        expected = [abs(sum(column) / shards) + np.sqrt(np.mean((column - column.mean()) ** 2)) for column in x.T]
        np.testing.assert_allclose(spread_sensitivity(x), expected, **tolerance(np.float64, shards))


def all_assignments(cost: np.ndarray, sizes: list[int], bits: list[int], budget: int) -> tuple[float, int]:
    """The least cost within the budget, and the least size that has it, by trying everything."""
    outcomes = []
    for each in itertools.product(range(len(bits)), repeat=len(sizes)):
        size = sum(n * bits[choice] for n, choice in zip(sizes, each, strict=True))
        if size <= budget:
            outcomes.append((sum(cost[layer, choice] for layer, choice in enumerate(each)), size))
    return min(outcomes)


@pytest.mark.exercise("chapters.quantization.mixed_precision.assign_bits", points=3)
class TestAssignment:
    @given(SEEDS, st.integers(1, 5), st.sampled_from([[2, 3, 4, 8], [8, 2, 4], [3], [1, 5]]), st.floats(0, 1))
    def test_is_the_cheapest_of_all(self, seed, layers, bits, share):
        rng = np.random.default_rng(seed)
        sizes = [int(n) for n in rng.choice([1, 4, 4, 6, 13], layers)]
        cost = rng.integers(-2, 9, (layers, len(bits))).astype(float) * rng.choice([1.0, 2.0**-40])
        budget = int((min(bits) + share * (max(bits) - min(bits))) * sum(sizes))
        found = assign_bits(cost, sizes, bits, budget)
        assert found.shape == (layers,) and found.dtype == np.int64
        chosen = [bits.index(width) for width in found]
        outcome = cost[np.arange(layers), chosen].sum(), int(found @ np.array(sizes))
        assert outcome == all_assignments(cost, sizes, bits, budget)

    @given(SEEDS)
    def test_one_bit_of_budget_more_never_costs_more(self, seed):
        rng = np.random.default_rng(seed)
        sizes, bits = [3, 5, 2, 7], [2, 3, 4]
        cost = rng.random((4, 3))
        spent = [assign_bits(cost, sizes, bits, budget) for budget in range(2 * 17, 4 * 17 + 2)]
        total = [sum(cost[layer, bits.index(width)] for layer, width in enumerate(each)) for each in spent]
        assert all(later <= now for now, later in itertools.pairwise(total))
        assert all(each @ sizes <= budget for each, budget in zip(spent, range(2 * 17, 4 * 17 + 2), strict=True))

    def test_hundred_layers_are_no_more_work_than_their_sizes(self):
        cost = np.random.default_rng(0).random((100, 1)) * np.array([16.0, 4, 1, 0])
        found = assign_bits(cost, [4096] * 100, [2, 3, 4, 8], 300 * 4096)
        assert found.sum() <= 300 and len(found) == 100
        ranks = cost[:, 0].argsort()
        assert (np.diff(found[ranks]) >= 0).all(), "the more a layer suffers, the more bits it gets"

    @pytest.mark.parametrize(
        ("cost", "sizes", "budget"),
        [
            (np.ones((2, 2)), [3, 4], 13),
            (np.array([[1, np.nan], [0, 0]]), [3, 4], 99),
            (np.ones((2, 3)), [3, 4], 99),
            (np.ones((1, 2)), [3, 4], 99),
            (np.ones((0, 2)), [], 0),
        ],
    )
    def test_refuses_what_cannot_be_met(self, cost, sizes, budget):
        with pytest.raises(ValueError):
            assign_bits(cost, sizes, [2, 4], budget)


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.mixed_precision.dequantize_kernel", points=3)
@pytest.mark.exercise("kernels.quantization.mixed_precision.store_octet", points=2)
class TestKernel:
    @settings(max_examples=8)
    @given(SEEDS, WIDTHS, GROUPS, st.sampled_from(KERNEL_DTYPES))
    def test_gives_the_weights_of_every_layer(self, seed, bits, group, dtype):
        book = oracle("quantization.mixed_precision")
        held = book.pack_layers(drawn(seed, bits, group))
        parts = {name: poisoned(part) for name, part in on_device(held).items()}
        found = kernels.dequantize_layers(*parts.values(), group, dtype)
        assert found.dtype is dtype and found.shape == (8 * held.table[-1, 2],)
        expected = torch.from_numpy(book.dequantize_layers(*held))
        torch.testing.assert_close(found.cpu().double(), expected, **tolerance(dtype))

    @pytest.mark.parametrize("which", ["packed", "table", "scale", "zero"])
    @pytest.mark.parametrize("begins", [False, True])
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        layers = drawn(1, [3, 8, 2, 4], 8)
        parts = on_device(oracle("quantization.mixed_precision").pack_layers(layers))
        parts[which] = walled(parts[which], begins)
        found = kernels.dequantize_layers(*parts.values(), 8)
        np.testing.assert_allclose(found.cpu().numpy(), weights_of(layers), **tolerance(np.float16))


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match="budget must be at least 14 bits, 2 a weight, got 13"):
        assign_bits(np.ones((2, 2)), [3, 4], [2, 4], 13)
    with pytest.raises(ValueError, match="size and probes must be at least 1, got 3 and 0"):
        hutchinson(lambda v: v, 3, 0)
    with pytest.raises(ValueError, match="sensitivity must be one of trace, eigenvalue, error, got 'gut'"):
        mixed_precision.layer_sensitivity(tiny_model(), tokens(1, 4), "gut")
