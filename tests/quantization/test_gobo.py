"""GOBO: outliers against Python's bell curve, centroids against a search by hand, both against golden arrays."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization.gobo import (
    codebook_matmul,
    equal_shares,
    gobo,
    kmeans_centroids,
    l1_centroids,
    linear_centroids,
    nearest,
    outlier_mask,
)
from chapters.shared.bit_fields import pack
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, poisoned, tolerance
from tests.fences import walled
from tests.quantization.codebooks import PARTS, arguments, expected_of, products

codebook = kernel("quantization.gobo")
SEEDS = st.integers(0, 2**32 - 1)
BITS = st.integers(1, 4)


def bell(seed: int, *shape: int, scale: float = 0.05, wild: float = 0.02) -> np.ndarray:
    """A bell curve off centre, some of whose members lie far out."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0.3 * scale, scale, shape)
    return np.where(rng.random(shape) < wild, 8 * weight, weight)


def log_density(weight: np.ndarray) -> np.ndarray:
    """The logarithm of each weight's density under the Gaussian of all, by Python's own curve."""
    curve = NormalDist(weight.mean(), weight.std())
    densities = [curve.pdf(value) for value in weight.ravel().tolist()]
    return np.array([math.log(each) if each > 0 else -np.inf for each in densities]).reshape(weight.shape)


@pytest.mark.exercise("chapters.quantization.gobo.outlier_mask", points=1)
class TestOutliers:
    @given(
        SEEDS, st.sampled_from([(1, 1), (1, 2), (3, 1), (7, 33), (2, 3, 5), (40,)]),
        st.sampled_from([1e-6, 0.04, 1.0, 30.0, 1e6]), st.floats(-8, 3),
    )  # fmt: skip
    def test_are_the_weights_of_little_density(self, seed, shape, scale, threshold):
        weight = bell(seed, *shape, scale=scale)
        before = weight.copy()
        found = outlier_mask(weight, threshold)
        assert found.dtype == bool and found.shape == shape and (weight == before).all()
        if weight.size > 1:
            density = log_density(weight)
            clear = np.abs(density - threshold) > 1e-6
            np.testing.assert_array_equal(found[clear], (density <= threshold)[clear])

    def test_equal_the_released_step(self):
        arrays = golden("quant/gobo")
        weight = arrays["W"]
        expected = np.unpackbits(arrays["outlier_mask"]).astype(bool).reshape(weight.shape)
        assert expected.sum() == arrays["n_outliers"]
        np.testing.assert_array_equal(outlier_mask(weight), expected)

    @given(SEEDS, st.integers(-20, 20), st.floats(-6, 0))
    def test_depend_on_the_unit_of_weight_and_the_threshold_alike(self, seed, power, threshold):
        weight = bell(seed, 9, 21, scale=1.0)
        clear = np.abs(log_density(weight) - threshold) > 1e-6
        found = outlier_mask(2.0**power * weight, threshold - power * np.log(2))
        np.testing.assert_array_equal(found[clear], outlier_mask(weight, threshold)[clear])

    def test_are_more_when_all_weights_are_ten_times_as_large(self):
        weight = np.random.default_rng(0).normal(0, 0.04, (64, 64))
        few, many = outlier_mask(weight), outlier_mask(10 * weight)
        assert 0 < few.sum() < many.sum() < 100 and (few <= many).all()
        assert outlier_mask(1000 * weight).all()

    @pytest.mark.parametrize("value", [0.0, 0.1, -3e8, 7, 7.7])
    def test_are_none_among_equal_weights(self, value):
        for threshold in (-4.0, 1e3):  # 1e3 makes an outlier of everything else
            assert not outlier_mask(np.full((25, 40), value), threshold).any()
        assert outlier_mask(np.array([value, value + 1]), 1e3).all()

    def test_are_none_without_a_threshold(self):
        assert not outlier_mask(np.array([[0.0] * 99 + [1e9]]), -np.inf).any()

    def test_take_the_population_deviation(self):
        weight = np.array([[-1.0, 1.0]])  # deviation 1, log density −1.42; a sample's deviation would make it −1.52
        assert not outlier_mask(weight, -1.46).any() and outlier_mask(weight, -1.40).all()

    def test_take_statistics_in_float64(self):
        weight = (400 * np.random.default_rng(1).standard_normal((60, 60))).astype(np.float16)
        expected = log_density(weight.astype(float)) <= -10
        assert 5 < expected.sum() < 200
        np.testing.assert_array_equal(outlier_mask(weight, -10), expected)

    def test_refuse_a_threshold_that_is_no_number(self):
        with pytest.raises(ValueError):
            outlier_mask(np.ones((2, 2)), np.nan)


def assigned(values: np.ndarray, centroids: np.ndarray) -> list[list[float]]:
    """For each centroid the values nearest to it, one after another; on a tie the lower."""
    cells: list[list[float]] = [[] for _ in centroids]
    for value in values.tolist():
        distances = [abs(value - centroid) for centroid in centroids]
        cells[distances.index(min(distances))].append(value)
    return cells


def l1_error(cells: list[list[float]], centroids: np.ndarray) -> float:
    return sum(abs(value - centroid) for cell, centroid in zip(cells, centroids, strict=True) for value in cell)


def search_by_hand(values: np.ndarray, bits: int) -> tuple[np.ndarray, list[float]]:
    """GOBO's search, value by value."""
    values = np.sort(values)
    size = len(values) // 2**bits
    centroids = np.array([values[size * i : size * (i + 1)].mean() for i in range(2**bits)])
    cells = assigned(values, centroids)
    errors = [l1_error(cells, centroids)]
    while True:
        moved = np.array([np.mean(cell) if cell else old for cell, old in zip(cells, centroids, strict=True)])
        new = assigned(values, moved)
        errors.append(l1_error(new, moved))
        if errors[-1] >= errors[-2]:
            return centroids, errors
        if new == cells:
            return moved, errors
        centroids, cells = moved, new


@pytest.mark.exercise("chapters.quantization.gobo.l1_centroids", points=2)
class TestCentroids:
    @given(SEEDS, st.integers(1, 3), st.sampled_from([0, 1, 5, 60, 199]))
    def test_are_those_of_the_search_by_hand(self, seed, bits, more):
        values = bell(seed, 2**bits + more, scale=1.0)
        (found, errors), (expected, trace) = l1_centroids(values, bits), search_by_hand(values, bits)
        assert found.shape == (2**bits,) and len(errors) == len(trace)
        np.testing.assert_allclose(found, expected, **tolerance(np.float64, 100))
        np.testing.assert_allclose(errors, trace, **tolerance(np.float64, 100))

    @given(SEEDS, BITS, st.sampled_from(["bell", "ties", "equal", "tiny", "huge", "one far out"]))
    def test_fall_in_error_until_they_stop(self, seed, bits, kind):
        rng = np.random.default_rng(seed)
        values = rng.standard_normal(80) * {"tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)
        if kind == "ties":
            values = rng.integers(-3, 4, 80).astype(float)
        elif kind == "equal":
            values[:] = 0.1
        elif kind == "one far out":
            values[7] = 1e6
        before = values.copy()
        found, errors = l1_centroids(values, bits)
        np.testing.assert_array_equal(values, before)
        assert (np.diff(found) >= 0).all()
        assert (np.diff(errors)[:-1] < 0).all()
        spread = np.abs(values).max()
        least = np.abs(values[:, None] - found).min(axis=1).sum()
        np.testing.assert_allclose(least, min(errors), **tolerance(np.float64, 80, spread))

    @given(SEEDS, BITS)
    def test_do_not_depend_on_the_order_of_values(self, seed, bits):
        values = bell(seed, 90)
        shuffled = np.random.default_rng(seed).permutation(values)
        for part, other in zip(l1_centroids(values, bits), l1_centroids(shuffled, bits), strict=True):
            np.testing.assert_allclose(part, other, **tolerance(np.float64))

    def test_are_the_values_where_these_are_so_few(self):
        values = np.array([3.0, -1.0, 2.0, 0.5])
        found, errors = l1_centroids(values, 2)
        assert found.tolist() == [-1.0, 0.5, 2.0, 3.0] and errors == [0.0, 0.0]


class TestRivals:
    @given(SEEDS, BITS)
    def test_gobo_stops_on_the_way_of_k_means(self, seed, bits):
        values = bell(seed, 300)
        (_, errors), (found, everything) = l1_centroids(values, bits), kmeans_centroids(values, bits)
        assert errors == everything[: len(errors)]
        cells = assigned(values, found)
        means = [np.mean(cell) if cell else old for cell, old in zip(cells, found, strict=True)]
        np.testing.assert_allclose(found, means, **tolerance(np.float64))

    def test_plain_rounding_takes_even_steps(self):
        found, errors = linear_centroids(np.array([5.0, -1.0, 0.0]), 2)
        assert found.tolist() == [-1.0, 1.0, 3.0, 5.0] and errors == [1.0]

    @pytest.mark.parametrize("bits", [2, 4])
    def test_start_as_the_third_party_does(self, bits):
        arrays = golden("quant/gobo")
        weight = arrays["W"].astype(float)
        inner = np.sort(weight[~outlier_mask(weight)])
        centroids, edges = equal_shares(inner, bits), arrays[f"b{bits}/bins"]
        np.testing.assert_allclose(centroids, arrays[f"b{bits}/centroids_init"], rtol=0, atol=1e-6)
        size = len(inner) // 2**bits
        np.testing.assert_array_equal(np.append(inner[: size * 2**bits : size], inner[-1]).astype(np.float32), edges)
        codes = np.digitize(weight, edges, right=True) - 1  # as there; the least weight gets -1, which is put right
        values = np.where(outlier_mask(weight), weight, centroids[np.clip(codes, 0, 2**bits - 1)])
        np.testing.assert_allclose(values.ravel(), arrays[f"b{bits}/deq"], rtol=0, atol=1e-6)
        error = np.abs(values - weight).sum()
        np.testing.assert_allclose(error, arrays[f"b{bits}/l1"], rtol=1e-4)
        assert l1_centroids(inner, bits)[1][0] <= error, "the nearest centroid is no worse than that of the share"

    def test_ties_go_to_the_lower_centroid(self):
        values = np.array([-9.0, 0.5, 0.6, 1.0, 1.5, 9.0])
        assert nearest(values, np.array([0.0, 1.0, 2.0])).tolist() == [0, 0, 1, 1, 1, 2]


class TestGobo:
    @given(SEEDS, st.integers(1, 5), st.sampled_from([(1, 64), (13, 7), (33, 5)]), st.sampled_from([-np.inf, -1.0]))
    def test_keeps_outliers_and_gives_the_others_the_nearest_centroid(self, seed, bits, shape, threshold):
        weight = bell(seed, *shape)
        held = gobo(weight, bits, threshold)
        outlier, values = outlier_mask(weight, threshold), held.dequantize()
        np.testing.assert_array_equal(values[outlier], weight[outlier])
        best = np.abs(weight[..., None] - held.centroids).min(axis=-1)
        np.testing.assert_allclose(np.abs(values - weight)[~outlier], best[~outlier], **tolerance(np.float64))
        assert held.bits == bits and held.codes.dtype == np.uint8 and len(held.value) == outlier.sum()
        for row in range(shape[0]):
            columns = held.column[held.start[row] : held.start[row + 1]]
            assert columns.tolist() == np.flatnonzero(outlier[row]).tolist()
        assembled = held.centroids[held.codes]
        assembled[held.row, held.column] += held.extra()
        np.testing.assert_allclose(assembled, values, **tolerance(np.float64))

    def test_says_what_it_refuses(self):
        weight = bell(0, 8, 8)
        for given_, complaint in (
            ((weight, 3, np.nan), "threshold must be a number, got nan"),
            ((weight, 3, -4, "best"), "centroids must be one of l1, kmeans, linear, got 'best'"),
            ((weight, 0), "bits must be an integer from 1 to 8, got 0"),
            ((weight[:, :0], 3), "weight must be a non-empty"),
            ((np.full((8, 8), np.inf), 3), "weight must be finite"),
            ((1e4 * weight, 3), r"threshold -4.0 leaves 0 of 64 weights .* 3 bits need 8; .* here σ = "),
            ((weight[:1, :7], 3, -np.inf), "leaves 7 of 7"),
        ):
            with pytest.raises(ValueError, match=complaint):
                gobo(*given_)


@pytest.mark.exercise("chapters.quantization.gobo.codebook_matmul", points=1)
class TestProduct:
    @given(products(), st.sampled_from([np.float16, np.float32, np.float64]))
    def test_adds_each_weight_and_each_outlier(self, product, dtype):
        given_ = [getattr(product, name) for name in PARTS]
        given_ = [part.astype(dtype) if part.dtype.kind == "f" else part for part in given_]
        found = codebook_matmul(*given_)
        x, _, centroids, start, column, extra = (part.tolist() for part in given_)
        expected = np.zeros((len(x), len(start) - 1))
        for token, row in np.ndindex(expected.shape):
            for place, code in enumerate(product.codes[row]):
                expected[token, row] += x[token][place] * centroids[code]
            for i in range(start[row], start[row + 1]):
                expected[token, row] += x[token][column[i]] * extra[i]
        assert found.dtype == np.float64 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, **tolerance(np.float64, product.codes.shape[1], 10))

    def test_is_that_of_the_weights_that_gobo_leaves(self):
        weight = bell(3, 10, 70)
        held = gobo(weight, 3, -1.0)
        x = np.random.default_rng(0).normal(size=(3, 70))
        found = codebook_matmul(x, pack(held.codes, 3), held.centroids, held.start, held.column, held.extra())
        assert len(held.value) > 3
        np.testing.assert_allclose(found, x @ held.dequantize().T, **tolerance(np.float64, 70))

    @pytest.mark.parametrize(
        ("which", "shape"),
        [("x", (1, 65)), ("x", (64,)), ("x", (1, 1, 64)), ("packed", (2, 2, 2, 4)), ("packed", (1, 3, 2, 4)),
         ("centroids", (4,)), ("centroids", (7,)), ("centroids", (9,)), ("start", (4,)), ("start", (7,)),
         ("start", (10,)), ("column", (1,)), ("extra", (3,))],
    )  # fmt: skip
    def test_refuses_shapes_that_do_not_fit(self, which, shape):
        parts = arguments(**{which: torch.zeros(shape, dtype=arguments()[which].dtype)})
        with pytest.raises(ValueError):
            codebook_matmul(*(part.numpy() for part in parts.values()))


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.gobo.matvec_kernel", points=3)
class TestMatvecKernel:
    @given(
        products(tokens=st.just(1)), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]),
        st.sampled_from(KERNEL_DTYPES), st.booleans(),
    )  # fmt: skip
    def test_equals_the_reference(self, product, rows, fields, dtype, aligned):
        held = [poisoned(part, aligned) for part in product.rounded(dtype)]
        found = codebook.codebook_matmul(*held, rows=rows, fields=fields)
        expected, largest = expected_of(product, held)
        assert found.dtype is dtype
        close = tolerance(dtype, product.x.shape[1], scale=largest)
        np.testing.assert_allclose(found.double().cpu().numpy(), expected, **close)

    @pytest.mark.parametrize("bits", [2, 3])
    def test_meets_each_code_with_its_own_activation(self, bits):
        codes = np.random.default_rng(bits).integers(0, 2**bits, (6, 70))
        parts = arguments(packed=torch.from_numpy(pack(codes, bits)), centroids=torch.arange(2.0**bits))
        for column in (0, 6, 31, 69):
            parts["x"] = torch.eye(70)[column : column + 1].contiguous()
            parts["start"] = torch.zeros(7, dtype=torch.int32)
            parts["column"], parts["extra"] = torch.zeros(0, dtype=torch.int16), torch.zeros(0)
            found = codebook.codebook_matmul(**{name: part.to(DEVICE) for name, part in parts.items()}, rows=1)
            np.testing.assert_array_equal(found[0].cpu().numpy(), codes[:, column])

    def test_rounds_nothing_but_the_result(self):
        x = torch.tensor([[1.0] + 63 * [2.0**-11]], dtype=torch.float16)
        parts = arguments(x=x, centroids=torch.full((8,), 1.0), extra=torch.tensor([2.0**-11, 0.0]))
        found = codebook.codebook_matmul(**{name: part.to(DEVICE) for name, part in parts.items()})
        assert found.dtype is torch.float16 and (found.float() == 1 + 2.0**-5).all()

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", PARTS)
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        held = {name: part.to(DEVICE) for name, part in arguments().items()}
        held[which] = walled(held[which], begins)
        found = codebook.codebook_matmul(**held, rows=2, fields=4)
        np.testing.assert_array_equal(found.cpu().numpy(), [[0, 1, 0, 0, 0, -2]])
