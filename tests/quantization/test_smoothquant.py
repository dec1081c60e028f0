"""SmoothQuant's exercises: each function against its definition and the authors' arrays, the kernel against both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization.smoothquant import absmax_scale, fold, quantize, smoothing_scale
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, poisoned, tolerance
from tests.fences import walled
from tests.quantization.smoothing import SEEDS, TILE, drawn, matrices, pairs, reference

smoothquant = kernel("quantization.smoothquant")
ALPHAS = st.sampled_from([0.0, 0.25, 0.5, 0.85, 1.0])


def fake_quantized(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What codes stand for, in float32 as the original computes it."""
    return codes.astype(np.float32) * scale[:, None]


@pytest.mark.exercise("chapters.quantization.smoothquant.smoothing_scale", points=2)
class TestSmoothingScale:
    @given(pairs(), ALPHAS)
    def test_is_the_formula_in_each_channel(self, pair, alpha):
        x, gain, readers = pair
        act_max = np.abs(x * gain).max(axis=0)
        found = smoothing_scale(act_max, readers, alpha)
        assert found.dtype == np.float64 and found.shape == act_max.shape
        for j, largest in enumerate(act_max):
            weight = max(abs(float(value)) for reader in readers for value in reader[:, j])
            expected = max(largest**alpha / max(weight, 1e-5) ** (1 - alpha), 1e-5)
            np.testing.assert_allclose(found[j], expected, **tolerance(np.float64, scale=expected))

    @given(pairs())
    def test_half_gives_inputs_and_weights_the_same_maxima(self, pair):
        x, gain, readers = pair
        scale = smoothing_scale(np.abs(x * gain).max(axis=0), readers, 0.5)
        inputs = np.abs(x * gain / scale).max(axis=0)
        weights = np.max([np.abs(reader * scale).max(axis=0) for reader in readers], axis=0)
        np.testing.assert_allclose(inputs, weights, **tolerance(np.float64, scale=weights.max()))

    @given(pairs(), ALPHAS, SEEDS)
    def test_outliers_that_sit_in_norm_and_weights_are_undone(self, pair, alpha, seed):
        x, gain, readers = pair
        factor = 2.0 ** np.random.default_rng(seed).integers(-3, 8, len(gain))
        act_max = np.abs(x * gain).max(axis=0)
        plain = smoothing_scale(act_max, readers, alpha)
        planted = smoothing_scale(act_max * factor, [reader / factor for reader in readers], alpha)
        np.testing.assert_allclose(planted, factor * plain, **tolerance(np.float64, scale=(factor * plain).max()))

    @pytest.mark.parametrize("alpha", [0.25, 0.75, 1.0])
    def test_equals_the_authors(self, alpha):
        arrays = golden("quant/smoothquant")
        readers = [arrays[f"W{i}"].astype(np.float32) for i in range(3)]
        found = smoothing_scale(arrays["act_scales"], readers, alpha)
        np.testing.assert_allclose(found, arrays[f"a{alpha}/smooth_s"], **tolerance(np.float32))
        smoothed = arrays["ln_weight"] / found
        np.testing.assert_allclose(smoothed, arrays[f"a{alpha}/ln_weight"], **tolerance(np.float32))

    def test_dead_channels_have_a_scale(self):
        readers = [np.array([[0.0, 1.0, 0.0]]), np.array([[0.0, -4.0, 0.0]])]
        found = smoothing_scale(np.array([9.0, 0.0, 0.0]), readers, 0.5)
        np.testing.assert_allclose(found, [3 / 1e-5**0.5, 1e-5, 1e-5], **tolerance(np.float64, scale=1e3))
        np.testing.assert_allclose(smoothing_scale(np.zeros(1), [np.full((1, 1), 4.0)], 0.0), [0.25])

    def test_is_computed_in_double_precision(self):
        found = smoothing_scale(np.array([2.0], np.float16), [np.array([[3.0]], np.float16)], 0.5)
        np.testing.assert_allclose(found, [(2 / 3) ** 0.5], **tolerance(np.float64))

    def test_leaves_its_arguments_alone(self):
        act_max, reader = np.array([1.0, 2.0]), np.array([[-3.0, 4.0]])
        smoothing_scale(act_max, [reader], 0.5)
        assert act_max.tolist() == [1, 2] and reader.tolist() == [[-3, 4]]

    @pytest.mark.parametrize(
        ("act_max", "readers", "alpha"),
        [
            (np.ones(2), [np.ones((3, 2))], -0.1),
            (np.ones(2), [np.ones((3, 2))], 1.1),
            (np.ones(2), [np.ones((3, 2))], float("nan")),
            (np.ones(2), [], 0.5),
            (np.ones(2), [np.ones((3, 2)), np.ones((2, 3))], 0.5),
            (np.ones(2), [np.ones(2)], 0.5),
            (np.ones((1, 2)), [np.ones((3, 2))], 0.5),
            (np.ones((2, 2)), [np.ones((3, 2))], 0.5),
            (np.array([1, -1.0]), [np.ones((3, 2))], 0.5),
            (np.array([1, np.inf]), [np.ones((3, 2))], 0.5),
            (np.ones(2), [np.ones((3, 2)), np.full((1, 2), np.nan)], 0.5),
            (np.ones(2), [np.ones((3, 2)), np.full((1, 2), -np.inf)], 0.5),
        ],
    )
    def test_refuses_what_makes_no_sense(self, act_max, readers, alpha):
        with pytest.raises(ValueError):
            smoothing_scale(act_max, readers, alpha)


@pytest.mark.exercise("chapters.quantization.smoothquant.fold", points=1)
class TestFold:
    @given(pairs(), SEEDS, st.booleans())
    def test_what_norm_and_readers_compute_stays_the_same(self, pair, seed, with_bias):
        x, gain, readers = pair
        rng = np.random.default_rng(seed)
        scale, bias = np.exp(rng.uniform(-3, 3, len(gain))), rng.standard_normal(len(gain))
        norm, weights = fold([gain, bias] if with_bias else [gain], readers, scale)
        assert len(norm) == 1 + with_bias and len(weights) == len(readers)
        before = x * gain + (bias if with_bias else 0)
        after = x * norm[0] + (norm[1] if with_bias else 0)
        np.testing.assert_allclose(after * scale, before, **tolerance(np.float64, scale=np.abs(before).max()))
        for old, new in zip(readers, weights, strict=True):
            terms = np.abs(before).max() * np.abs(old).max()
            np.testing.assert_allclose(after @ new.T, before @ old.T, **tolerance(np.float64, len(gain), terms))

    def test_makes_new_arrays(self):
        gain, weight = np.ones(2), np.ones((3, 2))
        fold([gain], [weight], np.array([2.0, 4.0]))
        assert (gain == 1).all() and (weight == 1).all()
        (new_gain,), (new_weight,) = fold([gain], [weight], np.ones(2))
        assert not np.shares_memory(gain, new_gain) and not np.shares_memory(weight, new_weight)

    @pytest.mark.parametrize(
        ("norm", "readers", "scale"),
        [
            ([np.ones(3)], [np.ones((2, 2))], np.ones(2)),
            ([np.ones(2), np.ones(1)], [np.ones((2, 2))], np.ones(2)),
            ([np.ones(2)], [np.ones((2, 2)), np.ones((2, 3))], np.ones(2)),
            ([np.ones(2)], [np.ones((2, 2)), np.ones((2, 1))], np.ones(2)),
            ([np.ones(2)], [np.ones((2, 2))], np.ones(1)),
            ([np.ones(2)], [np.ones((2, 2))], np.array([1.0, 0.0])),
            ([np.ones(2)], [np.ones((2, 2))], np.array([1.0, -1.0])),
            ([np.ones(2)], [np.ones((2, 2))], np.array([1.0, np.inf])),
        ],
    )
    def test_refuses_a_scale_that_does_not_fit(self, norm, readers, scale):
        with pytest.raises(ValueError):
            fold(norm, readers, scale)


@pytest.mark.exercise("chapters.quantization.smoothquant.absmax_scale", points=1)
class TestAbsmaxScale:
    @given(matrices(), st.booleans())
    def test_puts_the_largest_at_127(self, x, per_row):
        found = absmax_scale(x, per_row)
        groups = x if per_row else x.reshape(1, -1)
        expected = [max(max(abs(float(value)) for value in group), 1e-5) / 127 for group in groups]
        assert found.dtype == x.dtype and found.shape == (len(groups),)
        np.testing.assert_allclose(found, expected, **tolerance(x.dtype, scale=0.0))

    def test_half_precision_is_widened(self):
        found = absmax_scale(np.array([[65504.0, 1.0]], np.float16), True)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.array([65504], np.float32) / np.float32(127))

    @pytest.mark.parametrize("name", ["W0", "fq/t"])
    @pytest.mark.parametrize("per_row", [False, True])
    def test_equals_the_authors_to_the_last_bit(self, name, per_row):
        arrays = golden("quant/smoothquant")
        x = arrays[name].astype(np.float32)
        suffix = {"W0": ("per_tensor", "per_channel"), "fq/t": ("per_tensor", "per_token")}[name][per_row]
        expected = arrays[f"fq/{name.removeprefix('fq/')}_{suffix}"]
        scale = absmax_scale(x, per_row)
        np.testing.assert_array_equal(fake_quantized(np.rint(x / scale[:, None]), scale), expected)

    @pytest.mark.parametrize("x", [np.ones(3), np.ones((0, 3)), np.ones((3, 0)), np.full((2, 2), np.nan)])
    @pytest.mark.parametrize("per_row", [False, True])
    def test_refuses_what_has_no_maximum(self, x, per_row):
        with pytest.raises(ValueError):
            absmax_scale(x, per_row)
        with pytest.raises(ValueError):
            absmax_scale(np.array([[1.0, -np.inf]]), per_row)


@pytest.mark.exercise("chapters.quantization.smoothquant.quantize", points=1)
class TestQuantize:
    @given(matrices(tempers=("plain", "outlier column", "some rows zero")), st.booleans(), st.floats(0.001, 2))
    def test_is_the_nearest_code_of_each_number(self, x, per_row, step):
        scale = (step * np.arange(1, 1 + len(x) if per_row else 2)).astype(x.dtype)
        found = quantize(x, scale)
        assert found.dtype == np.int8 and found.shape == x.shape
        for (row, column), value in np.ndenumerate(x):
            code = round(float(value / scale[row if per_row else 0]))  # Python takes halves to the even number
            assert found[row, column] == min(max(code, -128), 127)

    def test_halves_go_to_the_even_code_and_what_is_larger_clips(self):
        x = np.array([[0.5, 1.5, 2.5, -0.5, -2.5, 127.5, 1e30, -128.5, -129, -1e30]])
        np.testing.assert_array_equal(quantize(x, np.ones(1)), [[0, 2, 2, 0, -2, 127, 127, -128, -128, -128]])
        assert quantize(np.full((1, 1), 1e300), np.full(1, 1e-300))[0, 0] == 127

    def test_rows_have_their_scales_in_a_square_matrix(self):
        np.testing.assert_array_equal(quantize(np.full((2, 2), 6.0), np.array([1.0, 2.0])), [[6, 6], [3, 3]])

    def test_divides_so_that_halves_stay_halves(self):
        assert quantize(np.array([[73.5]]), np.array([49.0])) == 2, "73.5 / 49 is 1.5, but 73.5 * (1 / 49) is less"

    @pytest.mark.parametrize("per_row", [False, True])
    def test_equals_the_authors(self, per_row):
        arrays = golden("quant/smoothquant")
        x = arrays["fq/t"]
        absmax = np.abs(x).max(axis=1) if per_row else np.abs(x).max(keepdims=True)[0]
        scale = absmax / np.float32(127)
        expected = arrays["fq/t_per_token" if per_row else "fq/t_per_tensor"]
        np.testing.assert_array_equal(quantize(x, scale), np.rint(expected / scale[:, None]))

    def test_computes_in_the_precision_of_x_but_half_precision_in_float32(self):
        x = np.array([[2.0**15]], np.float16)
        assert quantize(x, np.array([2.0**15 / 100.52])) == 101, "float16 counts in sixteenths here, and finds 100.5"
        for dtype in (np.float32, np.float64):
            found = quantize(np.array([[0.7]], np.float32), np.array([0.2], dtype))
            assert found == 4, "float32 finds 3.5, float64 a little less"
        assert quantize(np.array([[0.5 + 1e-12]]), np.ones(1)) == 1

    @pytest.mark.parametrize(
        ("x", "scale"),
        [
            (np.ones(3), np.ones(1)),
            (np.ones((3, 2)), np.ones(2)),
            (np.ones((3, 2)), np.ones((3, 1))),
            (np.ones((3, 2)), np.zeros(1)),
            (np.ones((3, 2)), -np.ones(3)),
            (np.ones((3, 2)), np.full(1, np.nan)),
            (np.ones((3, 2)), np.full(1, np.inf)),
            (np.zeros((3, 2), np.float32), np.full(1, 1e-50)),
            (np.full((3, 2), np.nan), np.ones(1)),
            (np.full((3, 2), np.inf), np.ones(1)),
        ],
    )
    def test_refuses_what_has_no_code(self, x, scale):
        with pytest.raises(ValueError):
            quantize(x, scale)


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.smoothquant.matmul_kernel", points=3)
class TestMatmulKernel:
    @given(
        SEEDS, st.sampled_from([1, 2, 16, 17, 37]), st.sampled_from([1, 7, 16, 33]), st.sampled_from([1, 31, 32, 97]),
        st.booleans(), st.booleans(), st.sampled_from([1, 2, 8]), st.sampled_from(KERNEL_DTYPES), st.booleans(),
    )  # fmt: skip
    def test_equals_the_reference(self, seed, M, N, K, per_token, per_channel, group, dtype, aligned):
        x, weight, x_scale, weight_scale = drawn(seed, M, N, K)
        parts = x, weight, x_scale[: None if per_token else 1], weight_scale[: None if per_channel else 1]
        held = [poisoned(part, aligned) for part in parts]
        found = smoothquant.w8a8_matmul(*held, dtype, **TILE, group=group)
        assert found.dtype is dtype
        close = tolerance(dtype, K, scale=128**2 * 0.02**2)
        np.testing.assert_allclose(found.double().cpu().numpy(), reference(*parts), **close)

    @pytest.mark.parametrize(("M", "N", "K"), [(1, 33, 16), (33, 5, 48), (16, 17, 64)])
    def test_loads_by_descriptors_give_the_same(self, M, N, K):
        held = [poisoned(part) for part in drawn(0, M, N, K)]
        plain, bulk = (smoothquant.w8a8_matmul(*held, torch.float32, bulk, **TILE) for bulk in (False, True))
        assert torch.equal(plain, bulk)

    @pytest.mark.parametrize("bulk", [False, True])
    def test_sums_are_exact(self, bulk):
        x, weight, *_ = drawn(0, 5, 3, 1008)
        one = torch.ones(1, device=DEVICE)
        found = smoothquant.w8a8_matmul(x, weight, one, one, torch.float32, bulk, **(TILE | {"block_k": 256}))
        np.testing.assert_array_equal(found.cpu().numpy(), x.cpu().numpy().astype(int) @ weight.cpu().numpy().T)
        low = torch.full((1, 1008), -128, dtype=torch.int8, device=DEVICE)
        found = smoothquant.w8a8_matmul(low, low, one, one, torch.float32, bulk, **(TILE | {"block_k": 256}))
        assert found.item() == 1008 * 128**2
        odd = torch.full((1, 2560), 127, dtype=torch.int8, device=DEVICE)
        signs = torch.where(torch.arange(2560, device=DEVICE) < 1280, odd, -odd)
        odd[0, 0] = 126  # halfway the sum is odd and above 2^24: no float32
        found = smoothquant.w8a8_matmul(odd, signs, one, one, torch.float32, bulk, **(TILE | {"block_k": 256}))
        assert found.item() == -127

    def test_sums_are_scaled_before_they_are_rounded(self):
        full = torch.full((1, 64), 127, dtype=torch.int8, device=DEVICE)
        small, large = (torch.full((1,), scale, device=DEVICE) for scale in (2.0**-20, 2.0**10))
        for scales in ((small, large), (large, small)):
            found = smoothquant.w8a8_matmul(full, full, *scales, torch.float16, **TILE)
            np.testing.assert_allclose(found.item(), 64 * 127**2 / 1024, **tolerance(torch.float16))

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", range(4))
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        parts = [poisoned(part) for part in drawn(1, 17, 19, 33)]
        parts[which] = walled(parts[which], begins)
        smoothquant.w8a8_matmul(*parts, torch.float32, **TILE)
