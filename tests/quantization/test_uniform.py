"""Uniform quantization against its definition, torch, and golden codes of torchao; the kernel against all that."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization.uniform import (
    SCHEMES,
    SYMMETRIC,
    grid,
    pack,
    quantize,
    running_range,
    unpack,
)
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, poisoned, tolerance
from tests.fences import walled
from tests.quantization.grids import (
    GOLDEN,
    SEEDS,
    TEMPERS,
    WIDTHS,
    assert_equal,
    drawn,
    expected_of,
    packed_by_hand,
    peer,
    steps,
)

uniform = kernel("quantization.uniform")

RANGES = st.lists(st.tuples(st.floats(-1e3, 0), st.floats(0, 1e3)), min_size=1, max_size=5)


@pytest.mark.exercise("chapters.quantization.uniform.grid", points=3)
class TestGrid:
    @given(RANGES, WIDTHS, st.sampled_from([np.float32, np.float64]))
    def test_asymmetric_grids_go_from_low_to_high(self, ranges, bits, dtype):
        low, high = (np.array(side, dtype) for side in zip(*ranges, strict=True))
        scale, zero = grid(low, high, bits)
        assert scale.dtype == zero.dtype == dtype and scale.shape == zero.shape == low.shape
        for one_low, one_high, step, at in zip(low, high, scale, zero, strict=True):
            if one_high - one_low > 1e-30:
                close = tolerance(dtype, scale=1e-30)
                np.testing.assert_allclose(step, (float(one_high) - float(one_low)) / (2**bits - 1), **close)
            assert at == min(max(round(float(-one_low / step)), 0), 2**bits - 1)

    @given(RANGES, st.integers(2, 8), st.sampled_from(sorted(SYMMETRIC)), st.sampled_from([np.float32, np.float64]))
    def test_symmetric_grids_have_zero_in_the_middle(self, ranges, bits, scheme, dtype):
        low, high = (np.array(side, dtype) for side in zip(*ranges, strict=True))
        scale, zero = grid(low, high, bits, scheme)
        assert scale.dtype == zero.dtype == dtype and (zero == 2 ** (bits - 1)).all()
        for one_low, one_high, step in zip(low, high, scale, strict=True):
            if one_high - one_low > 1e-30:
                expected = steps(float(one_low), float(one_high), bits, scheme)
                np.testing.assert_allclose(step, expected, **tolerance(dtype, scale=1e-30))

    @pytest.mark.parametrize(("key", "scheme", "bits", "n"), GOLDEN)
    def test_scales_and_zeros_are_torchs_to_the_last_bit(self, key, scheme, bits, n):
        x, scale, zero, _ = peer(key, bits, n)
        found = grid(np.minimum(x.min(1), 0), np.maximum(x.max(1), 0), bits, scheme)
        np.testing.assert_array_equal(found[0], scale[:, 0])
        np.testing.assert_array_equal(found[1], zero[:, 0])

    @pytest.mark.parametrize(("name", "bits"), [("minmax", 8), ("ema001", 8), ("ema05", 8), ("minmax_reduce_range", 7)])
    def test_static_grids_are_those_of_torchs_observers(self, name, bits):
        arrays = {key: value for key, value in golden("quant/uniform").items() if key.startswith(f"X/{name}/")}
        low, high, scale, zero = (arrays[f"X/{name}/{key}"].reshape(1) for key in ("min", "max", "scale", "zp"))
        found = grid(low, high, bits)
        np.testing.assert_array_equal(found[0], scale)
        np.testing.assert_array_equal(found[1], zero)

    @pytest.mark.parametrize(
        ("low", "high", "zero"), [(-0.5, 2.5, 0), (-2.5, 0.5, 2), (-1.5, 1.5, 2), (0, 3, 0), (-3, 0, 3)]
    )
    def test_zero_is_an_integer_and_ties_go_to_the_even_one(self, low, high, zero):
        assert [float(*part) for part in grid(np.array([low]), np.array([high]), 2)] == [1, zero]

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_the_least_normal_number_is_a_scale_and_what_is_below_becomes_one(self, dtype):
        least = np.finfo(dtype).tiny
        scale, zero = grid(np.array([[-8 * least], [-4 * least]]), np.zeros((2, 1), dtype), 4, "deepspeed")
        assert scale.tolist() == [[least], [1]] and zero.shape == (2, 1)

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("reach", [0.0, 1e-320])
    def test_a_group_of_zeros_takes_scale_one(self, scheme, reach):
        low, high = np.array([-reach, -1.0]), np.array([reach, 1.0])
        scale, zero = grid(low, high, 4, scheme)
        assert scale[0] == 1 and 0 < scale[1] < 1 and zero[0] == (0 if scheme == "asymmetric" else 8)
        assert (low == [-reach, -1]).all() and (high == [reach, 1]).all()

    @pytest.mark.parametrize(
        ("scheme", "scale"), [("gptq", 6), ("torch", 12), ("smoothquant", 14), ("deepspeed", 10.5), ("no_clipping", 14)]
    )
    def test_a_range_without_negative_numbers_is_halved_by_one_scheme(self, scheme, scale):
        found, zero = grid(np.array([0.0]), np.array([42.0]), 3, scheme)
        assert found[0] == scale and zero[0] == 4

    @pytest.mark.parametrize("scheme", sorted({*SYMMETRIC} - {"smoothquant", "no_clipping"}))
    def test_one_bit_is_enough_for_the_schemes_that_clip(self, scheme):
        scale, zero = grid(np.array([-1.0]), np.array([0.5]), 1, scheme)
        assert zero[0] == 1 and scale[0] == (1 if scheme == "deepspeed" else 2)

    @pytest.mark.parametrize(
        ("low", "high", "bits", "scheme"),
        [
            (-1.0, 1.0, 0, "asymmetric"), (-1.0, 1.0, 9, "torch"), (-1.0, 1.0, 4, "affine"),
            (-1.0, 1.0, 1, "smoothquant"), (-1.0, 1.0, 1, "no_clipping"), (0.5, 1.0, 4, "asymmetric"),
            (-1.0, -0.5, 4, "gptq"), (np.nan, 1.0, 4, "asymmetric"), (-1.0, np.inf, 4, "torch"),
            (-1.7e308, 1.7e308, 4, "asymmetric"), (*np.float32([-3e38, 3e38]), 4, "asymmetric"),
        ],
    )  # fmt: skip
    def test_refuses_what_is_no_range_or_scheme(self, low, high, bits, scheme):
        for size in (1, 0):
            with pytest.raises(ValueError):
                grid(np.array([low] * size), np.array([high] * size), bits, scheme)


@pytest.mark.exercise("chapters.quantization.uniform.quantize", points=2)
class TestQuantize:
    @given(SEEDS, WIDTHS, st.sampled_from([np.float16, np.float32, np.float64]), st.sampled_from([1, 3, 300]))
    def test_does_what_the_words_say_in_the_precision_of_its_arguments(self, seed, bits, dtype, spread):
        rng, wide = np.random.default_rng(seed), np.promote_types(dtype, np.float32).type
        x, scale = (spread * rng.standard_normal((3, 17))).astype(dtype), rng.uniform(0.1, 3, (3, 1)).astype(dtype)
        x[:, ::4] = np.rint(x[:, ::4]) * scale + scale / 2  # ties, or next to one
        zero, held = rng.integers(0, 2**bits, (3, 1)).astype(dtype), x.copy()
        found = quantize(x, scale, zero, bits)
        assert found.dtype == np.uint8 and found.shape == x.shape and (x == held).all()
        for (row, column), code in np.ndenumerate(found):
            quotient = x[row, column] * (wide(1) / scale[row, 0])
            assert code == min(max(round(float(quotient)) + int(zero[row, 0]), 0), 2**bits - 1)

    @given(SEEDS, WIDTHS, st.floats(0.01, 10))
    def test_no_other_code_is_nearer(self, seed, bits, scale):
        x, zero = np.random.default_rng(seed).uniform(-30, 30, 50), seed % 2**bits
        codes = quantize(x, np.array(scale), np.array(zero), bits)
        values = scale * (np.arange(2**bits) - zero)
        nearest = np.abs(x[:, None] - values).min(axis=1)
        np.testing.assert_allclose(np.abs(x - values[codes]), nearest, **tolerance(np.float64, scale=300))

    @given(SEEDS, st.integers(0, 255))
    def test_is_torchs_own_quantization(self, seed, zero):
        x = (np.random.default_rng(seed).standard_normal(200) * 50).astype(np.float32)
        expected = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x), 0.37, zero, 0, 255).numpy()
        codes = quantize(x, np.float32(0.37), np.float32(zero), 8)
        np.testing.assert_array_equal((codes.astype(np.float32) - zero) * np.float32(0.37), expected)

    @pytest.mark.parametrize(("key", "scheme", "bits", "n"), GOLDEN)
    def test_codes_are_those_of_torchao(self, key, scheme, bits, n):
        x, scale, zero, codes = peer(key, bits, n)
        np.testing.assert_array_equal(quantize(x, scale, zero.astype(np.float32), bits), codes)

    @pytest.mark.parametrize(
        ("name", "scale", "zero"), [("in/out_s1", 1, 0), ("s2_in/out_s0.5", 0.5, 0), ("in/out_s1_zp1", 1, 1)]
    )
    def test_ties_are_torchs_whatever_the_zero(self, name, scale, zero):
        arrays, (given_, made) = golden("quant/uniform"), name.split("/")
        x = arrays["tie/in"] if given_ == "in" else arrays["tie/out_s2_in"]
        codes = quantize(x, np.float32(scale), np.float32(zero + 128), 8)
        np.testing.assert_array_equal((codes.astype(np.float32) - zero - 128) * scale, arrays[f"tie/{made}"])

    def test_what_is_far_away_is_clipped(self):
        x = np.array([-1e300, -300, 300, 1e300, 1e308])
        np.testing.assert_array_equal(quantize(x, np.array(1e-3), np.array(5.0), 4), [0, 0, 15, 15, 15])

    @pytest.mark.parametrize(
        ("x", "bits"), [([np.nan], 4), ([1.0, np.inf], 4), ([], 4), ([1.0], 0), ([1.0], 9), ([1.0], True)]
    )
    def test_refuses_what_has_no_code(self, x, bits):
        with pytest.raises(ValueError):
            quantize(np.array(x), np.array(1.0), np.array(0.0), bits)


@pytest.mark.exercise("chapters.quantization.uniform.running_range", points=1)
class TestRunningRange:
    @given(SEEDS, st.integers(1, 5), st.sampled_from([None, 0.01, 0.5, 1.0]), st.sampled_from([-9, 0, 9]))
    def test_follows_the_batches(self, seed, count, momentum, middle):
        rng = np.random.default_rng(seed)
        batches = [middle + rng.standard_normal((i + 1, 3)).astype(np.float32) for i in range(count)]
        low, high = (getattr(batches[0].astype(float), end)() for end in ("min", "max"))
        for batch in batches[1:]:
            least, greatest = float(batch.min()), float(batch.max())
            if momentum is None:
                low, high = min(low, least), max(high, greatest)
            else:
                low, high = low + momentum * (least - low), high + momentum * (greatest - high)
        found = running_range(iter(batches), momentum)
        np.testing.assert_allclose(found, (min(low, 0), max(high, 0)), **tolerance(np.float64, scale=10))

    @pytest.mark.parametrize(("name", "momentum"), [("minmax", None), ("ema001", 0.01), ("ema05", 0.5)])
    def test_is_that_of_torchs_observers(self, name, momentum):
        arrays = golden("quant/uniform")
        found = running_range(np.split(arrays["X"], 4), momentum)
        expected = arrays[f"X/{name}/min"], arrays[f"X/{name}/max"]
        np.testing.assert_allclose(found, expected, **tolerance(np.float32, scale=100))

    def test_zero_joins_at_the_very_end(self):
        assert running_range([np.array([2.0, 4.0]), np.array([-1.0, 0.0])], 0.5) == (0, 2)

    @pytest.mark.parametrize(
        "batches", [[], [np.zeros((0, 4))], [np.ones(3), np.array([np.nan])], [np.array([np.inf])]]
    )
    def test_refuses_calibration_that_says_nothing(self, batches):
        with pytest.raises(ValueError):
            running_range(batches)

    @pytest.mark.parametrize("momentum", [0, -0.1, 1.1, np.nan])
    def test_refuses_a_momentum_that_is_no_share(self, momentum):
        with pytest.raises(ValueError):
            running_range([np.ones(3)], momentum)


@st.composite
def coded(draw) -> tuple[np.ndarray, int]:
    """(codes `[rows, columns]`, bits)"""
    bits, rows, eights = draw(WIDTHS), draw(st.sampled_from([1, 2, 5])), draw(st.integers(1, 5))
    codes = np.random.default_rng(draw(SEEDS)).integers(0, 2**bits, (rows, 8 * eights))
    return codes.astype(draw(st.sampled_from([np.uint8, np.int16, np.int64]))), bits


@pytest.mark.exercise("chapters.quantization.uniform.pack", points=2)
class TestPack:
    @given(coded())
    def test_puts_every_bit_in_its_place(self, drawn):
        codes, bits = drawn
        held = codes.copy()
        packed = pack(codes, bits)
        assert packed.dtype == np.uint8 and (codes == held).all()
        np.testing.assert_array_equal(packed, [packed_by_hand(row, bits) for row in codes])

    @pytest.mark.parametrize(("bits", "columns"), [(2, 4), (4, 2), (8, 1), (8, 3), (3, 8)])
    def test_a_row_need_only_fill_its_bytes(self, bits, columns):
        codes = np.arange(2 * columns).reshape(2, columns) % 2**bits
        np.testing.assert_array_equal(pack(codes, bits), [packed_by_hand(row, bits) for row in codes])
        np.testing.assert_array_equal(pack(codes[1], bits), packed_by_hand(codes[1], bits))

    def test_32_codes_of_3_bits_are_three_words(self):
        codes = np.random.default_rng(0).integers(0, 8, (1, 2, 32))
        words = pack(codes, 3).view("<u4")
        assert words.shape == (1, 2, 3)
        for row, found in zip(codes[0], words[0], strict=True):
            stream = sum(int(code) << 3 * i for i, code in enumerate(row))
            assert [int(word) for word in found] == [stream >> 32 * i & 0xFFFFFFFF for i in range(3)]

    @pytest.mark.parametrize(
        ("codes", "bits"),
        [
            ([[4, 0, 0, 0]], 2), ([[16, 0]], 4), ([[-1, 0]], 4), ([[256]], 8), ([[1, 2, 3]], 4), ([[1] * 4], 3),
            ([[1.0, 2.0]], 4), ([[]], 4), ([[1] * 8], 0), ([[1] * 8], 9),
        ],
    )  # fmt: skip
    def test_refuses_what_does_not_fit(self, codes, bits):
        with pytest.raises(ValueError):
            pack(np.array(codes), bits)


class TestUnpack:
    @given(coded())
    def test_reads_what_was_packed_by_hand(self, drawn):
        codes, bits = drawn
        found = unpack(np.stack([packed_by_hand(row, bits) for row in codes]), bits)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, codes)
        np.testing.assert_array_equal(unpack(pack(codes, bits), bits), codes)


@st.composite
def tensors(draw) -> tuple[torch.Tensor, int, int]:
    """(x, bits, group_size): groups of whole words, few of them a power of two."""
    bits, rows, groups = (draw(st.sampled_from(sizes)) for sizes in ([2, 3, 4, 8], [1, 2, 5], [1, 3]))
    size = draw(st.sampled_from([1, 2, 3])) * 32 // math.gcd(bits, 32)
    x = drawn(draw(SEEDS), draw(st.sampled_from(sorted(TEMPERS))), rows, groups * size, np.float32)
    return torch.from_numpy(x).to(DEVICE, draw(st.sampled_from(KERNEL_DTYPES))), bits, size


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.uniform.quantize_kernel", points=4)
class TestQuantizeKernel:
    @given(tensors(), st.sampled_from(SCHEMES), st.sampled_from([1, 2, 8]), st.booleans())
    def test_equals_the_reference_to_the_last_bit(self, drawn, scheme, parts, aligned):
        x, bits, size = drawn
        found = uniform.quantize_and_pack(poisoned(x, aligned), bits, size, scheme, parts=parts)
        assert_equal(found, expected_of(x, bits, size, scheme))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("scheme", ["asymmetric", "deepspeed"])
    def test_ties_go_to_the_even_number(self, scheme, bits):
        top = 2 ** (bits - 1)
        reach = (-top + 1, top) if scheme == "asymmetric" else (-top, top)  # scale 1; an odd zero, or one in the middle
        x = torch.arange(2 * reach[0], 2 * reach[1] + 1, device=DEVICE).repeat(3)[: 32 * bits].float() / 2
        x = torch.nn.functional.pad(x, (0, 32 * bits - len(x)))[None]
        assert_equal(uniform.quantize_and_pack(poisoned(x), bits, None, scheme), expected_of(x, bits, None, scheme))

    @pytest.mark.parametrize("temper", ["positive", "negative", "constant"])
    def test_zero_is_in_every_range(self, temper):
        x = torch.from_numpy(drawn(0, temper, 4, 64, np.float32)).to(DEVICE)
        assert_equal(uniform.quantize_and_pack(poisoned(x), 4, 32, parts=2), expected_of(x, 4, 32))

    @pytest.mark.parametrize("scheme", ["asymmetric", "gptq", "no_clipping"])
    @pytest.mark.parametrize(("value", "row", "column"), [(math.nan, 0, 63), (math.inf, 1, 0), (-math.inf, 2, 32)])
    def test_a_number_that_is_not_finite_shows_in_the_scale_of_its_group(self, value, row, column, scheme):
        x = torch.from_numpy(drawn(0, "plain", 3, 64, np.float32)).to(DEVICE)
        x[row, column] = value
        with np.errstate(invalid="ignore"):
            _, scale, _ = uniform.quantize_and_pack(poisoned(x), 4, 32, scheme, parts=2)
        expected = torch.ones(3, 2, dtype=torch.bool)
        expected[row, column // 32] = False
        np.testing.assert_array_equal(scale.isfinite().cpu().numpy(), expected)

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize(("rows", "columns", "parts"), [(3, 96, 1), (5, 32, 4), (1, 40, 2)])
    def test_loads_nothing_outside_of_x(self, rows, columns, parts, begins):
        x = torch.from_numpy(drawn(0, "plain", rows, columns, np.float32)).to(DEVICE)
        found = uniform.quantize_and_pack(walled(x, begins), 4, None, "asymmetric", parts=parts)
        assert_equal(found, expected_of(x, 4))
