"""Calibration: the histogram against loops and NumPy, the limits against the original's and brute force, the kernel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import calibration
from chapters.quantization.calibration import (
    Histogram,
    collect,
    count_magnitudes,
    divergence,
    entropy_limit,
    extended,
    largest_limit,
    moving_limit,
    mse_limit,
    percentile_limit,
)
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned
from tests.fences import walled
from tests.minitfm.models import tiny_model, tokens

kernels = kernel("quantization.calibration")
SEEDS = st.integers(0, 2**32 - 1)


def activations(seed: int, size: int) -> np.ndarray:
    """Float32 with outliers, zeros and values on the edges of bins of 1/4."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, size).astype(np.float32)
    x[rng.random(size) < 0.1] = 0
    x[rng.random(size) < 0.2] = rng.integers(-8, 8) / 4
    return x


def released(case: str) -> Histogram:
    """The original's histogram; both batches' largest magnitudes."""
    held = golden("quant/calibration")
    batches = held["acts"].astype(np.float32)
    largest = [float(np.abs(np.maximum(x, 0) if case == "relu" else x).max()) for x in batches]
    return Histogram(held[f"trt/{case}/hist"].astype(np.int64), float(held[f"trt/{case}/bin_width"]), tuple(largest))


CASES = pytest.mark.parametrize("case", ["signed", "relu"])
BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.mark.exercise("chapters.quantization.calibration.count_magnitudes", points=1)
class TestCounts:
    @given(SEEDS, st.sampled_from([1, 7, 64, 200]), st.sampled_from([0.25, 0.3]), st.sampled_from([1, 2, 5, 40]))
    def test_are_those_of_a_loop(self, seed, size, width, bins):
        x = activations(seed, size)
        expected = [0] * bins
        for value in np.abs(x):
            expected[min(int(value / np.float32(width)), bins - 1)] += 1
        counts, largest = count_magnitudes(x.reshape(-1, 1), width, bins)
        assert counts.dtype == np.int64 and counts.tolist() == expected and largest == np.abs(x).max()

    @pytest.mark.parametrize("width", [0.1, 0.9])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_divide_in_the_precision_of_x(self, width, dtype):
        x = np.arange(1, 400).astype(dtype) * dtype(width)  # edges of bins, or nearly
        places = [int(value / dtype(width)) for value in x]
        np.testing.assert_array_equal(count_magnitudes(x, width, 500)[0], np.bincount(places, minlength=500))

    def test_hold_what_is_far_beyond_the_last_bin_and_leave_x_alone(self):
        x = np.array([-1e30, 0.5, 2e9], np.float32)
        before = x.copy()
        counts, largest = count_magnitudes(x, 0.25, 4)
        assert counts.tolist() == [0, 0, 1, 2] and largest == np.float32(1e30)
        np.testing.assert_array_equal(x, before)

    @pytest.mark.parametrize(
        ("x", "width", "bins"),
        [([], 1, 2), ([0], -1, 2), ([1, np.nan], 1, 2), ([np.inf], 1, 2), ([1], 0, 2), ([1], np.nan, 2), ([1], 1, 0)],
    )
    def test_refuse_what_cannot_be_counted(self, x, width, bins):
        with pytest.raises(ValueError):
            count_magnitudes(np.array(x, np.float32), width, bins)


class TestCollecting:
    @CASES
    def test_gives_the_originals_histogram(self, case):
        batches = golden("quant/calibration")["acts"].astype(np.float32)
        found, expected = collect(np.maximum(batches, 0) if case == "relu" else batches), released(case)
        np.testing.assert_array_equal(found.counts, expected.counts)
        assert found.width == expected.width and found.largest == expected.largest

    @given(SEEDS, st.integers(1, 4), st.integers(1, 33))
    def test_loses_no_value(self, seed, batches, bins):
        x = np.stack([activations(seed + i, 50) * 2**i + 2.0**-9 for i in range(batches)]).astype(np.float32)
        found = collect(x, bins)
        assert found.counts.sum() == x.size and found.largest == tuple(np.abs(x).max(axis=1).tolist())
        assert len(found.counts) >= bins and found.width * len(found.counts) >= 0.999 * np.abs(x).max()
        if batches == 1:
            by_numpy = np.histogram(np.abs(x), bins, (0, np.abs(x).max()))[0]
            assert np.abs(np.cumsum(by_numpy) - np.cumsum(found.counts)).max() <= 2, "float32 edges move two at most"

    def test_refuses_no_batch_and_a_first_batch_without_a_width(self):
        for batches in ([], [np.zeros(3, np.float32)], [np.ones(0, np.float32)]):
            with pytest.raises(ValueError):
                collect(batches)

    def test_leaves_what_was_seen_alone(self):
        first = collect([np.array([1.0, 4], np.float32)], 4)
        before = first.counts.copy()
        second = extended(first, np.array([9.0], np.float32), 4)
        np.testing.assert_array_equal(first.counts, before)
        assert second.counts.tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 1]


class TestRanges:
    def test_largest_and_moving(self):
        seen = Histogram(np.ones(4, np.int64), 1.0, (2.0, 6.0, 1.0))
        assert largest_limit(seen) == 6
        assert moving_limit(seen, 0.5) == (2 + 6) / 2 / 2 + 1 / 2 and moving_limit(seen, 1) == 1
        for momentum in (0, 1.1, math.nan):
            with pytest.raises(ValueError, match="momentum must be"):
                moving_limit(seen, momentum)


@pytest.mark.exercise("chapters.quantization.calibration.percentile_limit", points=1)
class TestPercentile:
    @CASES
    @pytest.mark.parametrize("percent", [99.99, 99.9, 99.0])
    def test_equals_the_original(self, case, percent):
        expected = golden("quant/calibration")[f"trt/{case}/b8/percentile{percent}/amax"]
        assert percentile_limit(released(case), percent) == pytest.approx(float(expected), rel=1e-6)

    @given(SEEDS, st.integers(1, 20), st.sampled_from([1.0, 50.0, 90.0, 100.0]))
    def test_is_the_first_bin_that_reaches_the_share(self, seed, bins, percent):
        counts = np.random.default_rng(seed).integers(0, 9, bins) + np.eye(bins, dtype=np.int64)[0]
        found = percentile_limit(Histogram(counts.copy(), 0.5, (9.0,)), percent)
        place = round(found / 0.5)
        assert found == place * 0.5 and 100 * counts[: place + 1].sum() >= percent * counts.sum()
        assert place == 0 or 100 * counts[:place].sum() < percent * counts.sum()

    def test_a_bin_that_just_reaches_the_share_is_enough(self):
        seen = Histogram(np.array([1] * 10 + [0] * 3), 1.0, (10.0,))
        assert [percentile_limit(seen, percent) for percent in (10, 30, 70, 80, 90, 100)] == [0, 2, 6, 7, 8, 9]
        assert seen.counts.sum() == 10

    @pytest.mark.parametrize("percent", [0, -1, 100.1, np.nan])
    def test_refuses_what_is_no_share(self, percent):
        with pytest.raises(ValueError):
            percentile_limit(Histogram(np.ones(4, np.int64), 1.0, (4.0,)), percent)


@pytest.mark.exercise("chapters.quantization.calibration.mse_limit", points=2)
class TestSquaredError:
    @CASES
    @BITS
    def test_equals_the_original(self, case, bits):
        expected = golden("quant/calibration")[f"trt/{case}/b{bits}/mse/amax"]
        found = mse_limit(released(case), bits, unsigned=case == "relu", stride=4)
        assert found == pytest.approx(float(expected), rel=1e-6)

    @given(SEEDS, st.integers(2, 5), st.booleans(), st.integers(1, 9), st.integers(1, 3))
    def test_no_other_candidate_has_less(self, seed, bits, unsigned, start, stride):
        rng = np.random.default_rng(seed)
        counts = rng.geometric(0.2, 25) * (rng.random(25) < rng.choice([0.1, 1]))  # few bins tell more limits apart
        given_ = counts.copy()
        found = mse_limit(Histogram(given_, 0.5, (12.5,)), bits, unsigned, start, stride)
        np.testing.assert_array_equal(given_, counts)
        top, errors = 2 ** (bits - 1 + unsigned) - 1, {}
        for k in range(start, 25, stride):
            step, total = (k + 0.5) * 0.5 / top, 0.0
            for bin_, count in enumerate(counts):
                center = (bin_ + 0.5) * 0.5
                total += count * (min(np.rint(center / step), top) * step - center) ** 2
            errors[(k + 0.5) * 0.5] = total
        assert found in errors and errors[found] <= min(errors.values()) * (1 + 1e-9) + 1e-12

    def test_of_equal_errors_the_first_wins(self):
        counts = np.eye(20, dtype=np.int64)[4]  # the center 4.5 is on the grids up to 4.5 and 13.5
        assert [mse_limit(Histogram(counts, 1.0, (5.0,)), 3, start=start) for start in (1, 5)] == [4.5, 13.5]

    @pytest.mark.parametrize("only", [128, 129])
    def test_tries_every_bin_from_128_on_unless_told(self, only):
        seen = Histogram(np.eye(200, dtype=np.int64)[only], 1.0, (only + 0.5,))
        assert mse_limit(seen, 4) == only + 0.5
        assert mse_limit(seen, 4, True, 128, 1) == only + 0.5

    def test_the_first_bin_has_a_center_too(self):
        counts = np.array([9, 0, 0, 0, 0, 0])
        assert mse_limit(Histogram(counts, 1.0, (0.9,)), 4, start=1) == 3.5, "whose levels are 0.5 apart"

    @pytest.mark.parametrize(("bits", "start", "stride"), [(1, 1, 1), (9, 1, 1), (4, 8, 1), (4, 0, 1), (4, 1, 0)])
    def test_refuses_what_leaves_no_candidate(self, bits, start, stride):
        with pytest.raises(ValueError):
            mse_limit(Histogram(np.ones(8, np.int64), 1.0, (8.0,)), bits, False, start, stride)


@pytest.mark.exercise("chapters.quantization.calibration.divergence", points=3)
class TestDivergence:
    @given(SEEDS, st.integers(1, 30), st.integers(1, 9))
    def test_is_that_of_a_loop(self, seed, stop, levels):
        bins = np.random.default_rng(seed).integers(0, 3, 30).astype(float)
        bins[0] = 1.0
        shares = [min(k * levels // stop, levels - 1) for k in range(stop)]
        p, q = [0.0] * stop, [0.0] * stop
        for k in range(stop):
            level = [bins[j] for j in range(stop) if shares[j] == shares[k] and bins[j] > 0]
            p[k], q[k] = bins[k], sum(level) / len(level) if bins[k] > 0 else 0.0
        p[-1] += sum(bins[stop:])
        total = 0.0
        for one, other in zip(p, q, strict=True):
            if one > 0:
                one, other = one / sum(p), other / sum(q)
                total += one * math.log(one / other) if other > 0 else math.inf
        assert divergence(bins, stop, levels) == pytest.approx(total, abs=1e-9)

    def test_is_nothing_where_every_bin_is_a_level_and_nothing_is_cut_off(self):
        bins = np.array([3.0, 0, 2, 9])
        assert divergence(bins, 4, 4) == 0 and divergence(bins, 3, 3) > 0

    def test_is_infinite_where_all_lies_beyond(self):
        assert divergence(np.array([0.0, 0, 3, 1]), 2, 2) == math.inf == divergence(np.array([0.0, 2]), 1, 4)

    def test_leaves_the_bins_alone(self):
        bins = np.array([3.0, 1, 2, 9])
        divergence(bins, 2, 2)
        np.testing.assert_array_equal(bins, [3, 1, 2, 9])


class TestEntropy:
    @CASES
    @BITS
    def test_equals_the_original(self, case, bits):
        expected = golden("quant/calibration")[f"trt/{case}/b{bits}/entropy/amax"]
        seen = released(case)
        before = seen.counts.copy()
        found = entropy_limit(seen, bits, unsigned=case == "relu", stride=4)
        assert found == pytest.approx(float(expected), rel=1e-6)
        np.testing.assert_array_equal(seen.counts, before)

    def test_of_equal_divergences_the_last_wins(self):
        assert entropy_limit(Histogram(np.array([5, 5, 5, 5]), 1.0, (4.0,)), 8, start=2) == 4


class TestModel:
    def test_a_model_is_rounded_up_to_its_limits(self):
        model, text, errors = tiny_model(), tokens(4, 16), []
        seen, logits = calibration.histograms(model, text), model(text)
        layers = calibration.surgery.linears(model)
        assert all(seen[name].counts.sum() == 4 * 16 * layer.in_features for name, layer in layers.items())
        names = set(model.state_dict())
        for bits in (8, 3):
            rounded = tiny_model()
            calibration.quantize_model(rounded, seen, "largest", bits)
            errors.append((rounded(text) - logits).abs().mean().item())
            assert set(rounded.state_dict()) == names, "it can be saved as a plain one"
        assert 0 < errors[0] < errors[1]

    def test_a_layer_clips_what_lies_beyond_its_limit(self):
        linear = torch.nn.Linear(2, 2, bias=False)
        linear.weight.data = torch.eye(2)
        layer = calibration.StaticLinear(linear, limit=3.0, bits=3)
        assert layer(torch.tensor([[0.5, 9.0], [1.5, -9.0]])).tolist() == [[0, 3], [2, -3]]
        with pytest.raises(ValueError, match="limit must be above 0 and finite, got 0"):
            calibration.StaticLinear(linear, limit=0.0, bits=3)

    def test_refusals_name_what_is_wrong(self):
        seen = Histogram(np.ones(8, np.int64), 1.0, (8.0,))
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 9"):
            entropy_limit(seen, 9, start=1)
        with pytest.raises(ValueError, match="need 1 <= start < 8 for 8 bins and stride >= 1, got start=128"):
            mse_limit(seen, 8)
        with pytest.raises(ValueError, match=r"method must be one of largest, .*, got 'best'"):
            calibration.quantize_model(tiny_model(), {}, "best")


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.calibration.count_kernel", points=2)
class TestKernel:
    @given(
        SEEDS, st.sampled_from([1, 31, 128, 300]), st.sampled_from([1, 5, 40]), st.sampled_from([1, 2, 3]),
        st.sampled_from(KERNEL_DTYPES), st.booleans(),
    )  # fmt: skip
    def test_counts_as_the_reference_does(self, seed, size, bins, programs, dtype, aligned):
        x = poisoned(torch.from_numpy(activations(seed, size)).to(DEVICE, dtype), aligned)
        counts, largest = kernels.count_magnitudes(x, 0.25, bins, block=64, programs=programs)
        reference = oracle("quantization.calibration").count_magnitudes
        expected, top = reference(x.float().cpu().numpy(), 0.25, bins)
        np.testing.assert_array_equal(counts.cpu().numpy(), expected)
        assert counts.dtype is torch.int64 and largest.item() == top

    @pytest.mark.parametrize("begins", [False, True])
    def test_loads_nothing_outside_of_its_input(self, begins):
        x = walled(torch.full((70,), -3.0, device=DEVICE), begins)
        counts, largest = kernels.count_magnitudes(x, 1.0, 5, block=64, programs=2)
        assert counts.tolist() == [0, 0, 0, 70, 0] and largest.item() == 3

    @pytest.mark.parametrize("width", [0.1, 0.9])
    def test_divides_as_the_reference_does(self, width):
        x = torch.arange(1, 400, dtype=torch.float32, device=DEVICE) * np.float32(width)
        found = kernels.count_magnitudes(x, width, 500, block=64, programs=3)[0]
        expected = oracle("quantization.calibration").count_magnitudes(x.cpu().numpy(), width, 500)[0]
        np.testing.assert_array_equal(found.cpu().numpy(), expected)

    def test_what_is_far_beyond_the_last_bin_counts_in_it(self):
        counts, largest = kernels.count_magnitudes(torch.tensor([-1e30, 0.5], device=DEVICE), 0.25, 4)
        assert counts.tolist() == [0, 0, 1, 1] and largest.item() == np.float32(1e30)


@pytest.mark.kernel
def test_a_histogram_extended_far_beyond_its_first_batch_is_still_counted():
    counts, largest = kernels.count_magnitudes(torch.tensor([0.5, -69999.5, 1e9], device=DEVICE), 1.0, 70001, block=16)
    assert counts.nonzero().flatten().tolist() == [0, 69999, 70000] and largest.item() == 1e9


@pytest.mark.kernel
def test_edges_of_bins_fall_alike_for_the_kernel_and_its_peer():
    x = torch.arange(1, 400, dtype=torch.float32, device=DEVICE) * np.float32(3 / 1024)
    expected, top = oracle("quantization.calibration").count_magnitudes(x.cpu().numpy(), 3 / 1024, 300)
    for count in (kernels.count_magnitudes, kernels.by_torch):
        counts, largest = count(x, 3 / 1024, 300)
        np.testing.assert_array_equal(counts.cpu().numpy(), expected)
        assert largest.item() == top


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("x", "width", "bins", "error", "complaint"),
    [
        (torch.ones(0), 1.0, 4, ValueError, "x must have 1 to"),
        (torch.ones(3), 0.0, 4, ValueError, "width must be positive"),
        (torch.ones(3), 1e-50, 4, ValueError, "as a float32, got 1e-50"),
        (torch.ones(3), 1.0, 0, ValueError, "bins must be from 1 to 1048576, got 0"),
        (torch.ones(3, dtype=torch.float64), 1.0, 4, TypeError, "x must have dtype"),
        (torch.ones(4, 2).T, 1.0, 4, ValueError, "x must be contiguous"),
    ],
)
def test_the_wrapper_names_what_it_refuses(x, width, bins, error, complaint):
    with pytest.raises(error, match=complaint):
        kernels.count_magnitudes(x, width, bins)
