"""Quantized KV cache: codes group by group and against both original codes, attention against what codes stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chapters.quantization.kv_cache import decode_attention, dequantize, pack, quantize, unpack
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.quantization.caches import Step, half, numbers, packed_by_hand, quantized_by_hand, steps

kv_cache = kernel("quantization.kv_cache")
PER, RULES, BITS = (
    st.sampled_from(["token", "channel"]),
    st.sampled_from(["flexgen", "kivi"]),
    st.sampled_from([2, 4, 8]),
)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def problems(draw) -> tuple:
    """Arguments of `quantize`: groups longer than the axis and groups that leave a rest, where the rule has those."""
    x, per, rule = draw(numbers()), draw(PER), draw(RULES)
    length = x.shape[-1 if per == "token" else -2]
    sizes = [1, 3, 8, 32, 64] if rule == "flexgen" else [size for size in (1, 3, 8, 33, length) if length % size == 0]
    return x, draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from(sizes)), per, rule


@pytest.mark.exercise("chapters.quantization.kv_cache.quantize", points=3)
class TestQuantize:
    @given(problems())
    def test_rounds_each_group_on_its_own_grid(self, problem):
        x, bits, size, per, rule = problem
        held = x.copy()
        codes, grid = quantize(*problem)
        assert codes.dtype == np.uint8 and codes.shape == x.shape and grid.dtype == x.dtype and (x == held).all()
        expected = [quantized_by_hand(part, bits, size, per, rule) for part in x.reshape(-1, *x.shape[-2:])]
        np.testing.assert_array_equal(codes.reshape(-1, *x.shape[-2:]), [part[0] for part in expected])
        np.testing.assert_array_equal(grid.reshape(-1, *grid.shape[-3:]), [part[1] for part in expected])

    @given(problems())
    def test_no_number_moves_further_than_half_a_step(self, problem):
        x, bits, size, per, _ = problem
        assume(x.dtype == np.float64)
        codes, grid = quantize(*problem)
        found = oracle("quantization.kv_cache").dequantize(codes, grid, size, per)
        T, D = x.shape[-2:]
        step = np.repeat(grid[..., 0], size, -1 if per == "token" else -2)[..., :T, :D]
        slack = 1e-12 * np.abs(x).max() + 1e-300  # a range of rounding errors alone has no step
        assert (np.abs(found - x) <= step * (0.5 + 1e-9) + slack).all() and codes.max() < 2**bits

    @pytest.mark.parametrize("precision", ["f32", "f16"])
    @pytest.mark.parametrize(("case", "bits", "size"), [("g16_dim2_b4", 4, 16), ("g32_dim2_b2", 2, 32)])
    def test_equals_the_code_of_flexgen(self, case, bits, size, precision):
        arrays = golden("quant/flexgen_kv")
        x = arrays["kv"].astype({"f32": np.float32, "f16": np.float16}[precision])
        codes, grid = quantize(x, bits, size)  # per token and by this rule, unless another is asked for
        np.testing.assert_array_equal(codes, arrays[f"{case}/{precision}/codes"].reshape(x.shape))
        np.testing.assert_array_equal(grid[..., 1], arrays[f"{case}/{precision}/min"][..., 0])
        theirs = arrays[f"{case}/{precision}/scale"][..., 0]
        np.testing.assert_array_equal(grid[..., 0], 1 / theirs)

    @pytest.mark.parametrize("precision", ["f32", "f16"])
    @pytest.mark.parametrize("bits", [2, 4])
    def test_equals_the_code_of_kivi(self, bits, precision):
        arrays = golden("quant/kivi")
        x = arrays["V"].astype({"f32": np.float32, "f16": np.float16}[precision])
        codes, grid = quantize(x, bits, 32, "token", "kivi")
        np.testing.assert_array_equal(codes, arrays[f"V_b{bits}_g32/{precision}/codes"])
        for i, part in enumerate(("scale", "min")):
            np.testing.assert_array_equal(grid[..., i], arrays[f"V_b{bits}_g32/{precision}/{part}"][..., 0])
        along, other = quantize(x.swapaxes(-1, -2), bits, 32, "channel", "kivi")  # keys: the same, turned
        np.testing.assert_array_equal(along, codes.swapaxes(-1, -2))
        np.testing.assert_array_equal(other, grid.swapaxes(-2, -3))

    def test_a_group_without_a_range_stands_for_its_value(self):
        arrays = golden("quant/flexgen_kv")
        codes, grid = quantize(arrays["constant_group/in"], 4, 64, "token", "flexgen")
        np.testing.assert_array_equal(codes, arrays["constant_group/codes"].reshape(codes.shape))
        assert (grid[..., 0] == 0).all() and (grid[..., 1] == 1.5).all()
        codes, grid = quantize(np.array([[0, 1e-5]], np.float16), 4, 2, "token", "flexgen")  # 15 / range overflows
        assert not codes.any() and not grid.any()

    @pytest.mark.parametrize(("dtype", "least"), [(np.float16, 2.0**-24), (np.float32, 2.0**-149)])
    def test_a_step_below_the_normal_numbers_is_rounded_like_any(self, dtype, least):
        x = np.array([[0, 7], [0, 22]]) * least  # a 15th of 7 is no step, and of 22 one that 22 codes would have
        codes, grid = quantize(x.astype(dtype), 4, 2, "token", "kivi")
        assert codes.tolist() == [[0, 0], [0, 15]] and grid[..., 0].tolist() == [[0], [least]]

    @pytest.mark.parametrize(
        ("x", "bits", "size", "per", "rule"),
        [
            (np.ones((2, 4)), 0, 4, "token", "kivi"),
            (np.ones((2, 4)), 9, 4, "token", "kivi"),
            (np.ones((2, 4)), 4, 0, "token", "kivi"),
            (np.ones((2, 4)), 4, -2, "token", "flexgen"),
            (np.ones((2, 4)), 4, 3, "token", "kivi"),
            (np.ones((2, 4)), 4, 4, "channel", "kivi"),
            (np.ones((2, 4)), 4, 4, "row", "kivi"),
            (np.ones((2, 4)), 4, 4, "token", "gptq"),
            (np.ones((2, 4), int), 4, 4, "token", "kivi"),
            (np.ones(4), 4, 4, "token", "kivi"),
            (np.ones((0, 4)), 4, 4, "token", "kivi"),
            (np.ones((4, 0)), 4, 4, "token", "flexgen"),
            (np.array([[1.0, np.nan]]), 4, 2, "token", "kivi"),
            (np.array([[1.0, np.inf]]), 4, 2, "token", "flexgen"),
            (np.array([[6e4, -6e4]], np.float16), 4, 2, "token", "flexgen"),
        ],
    )
    def test_refuses_what_has_no_grid(self, x, bits, size, per, rule):
        with pytest.raises(ValueError):
            quantize(x, bits, size, per, rule)


@pytest.mark.exercise("chapters.quantization.kv_cache.pack", points=1)
class TestPack:
    @given(SEEDS, BITS, st.sampled_from([(4,), (3, 8), (2, 1, 20)]), st.sampled_from([np.uint8, np.uint32]))
    def test_puts_every_bit_in_its_place(self, seed, bits, shape, dtype):
        codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(dtype)
        held = codes.copy()
        packed = pack(codes, bits)
        assert packed.dtype == np.uint8 and (codes == held).all()
        np.testing.assert_array_equal(packed, packed_by_hand(codes, bits))
        np.testing.assert_array_equal(oracle("quantization.kv_cache").unpack(packed, bits), codes)

    def test_no_rows_of_codes_are_no_rows_of_bytes(self):
        packed = pack(np.zeros((2, 0, 8), np.uint8), 4)
        assert packed.shape == (2, 0, 4) and packed.dtype == np.uint8

    def test_equals_the_bytes_of_flexgen(self):
        arrays = golden("quant/flexgen_kv")
        codes, _ = oracle("quantization.kv_cache").quantize(arrays["kv"].astype(np.float32), 4, 64)
        np.testing.assert_array_equal(pack(codes, 4), arrays["packed_g64_dim2/data"])

    @pytest.mark.parametrize(
        ("codes", "bits"),
        [
            (np.full(4, 4, np.uint8), 2),
            (np.full(2, 300, np.uint16), 8),
            (np.ones(3, np.uint8), 4),
            (np.ones(2, np.uint8), 2),
            (np.ones(8, np.uint8), 3),
            (np.ones(8, np.uint8), 1),
            (np.ones(2, np.int64), 4),
            (np.ones(2), 4),
        ],
    )
    def test_refuses_what_fills_no_bytes(self, codes, bits):
        with pytest.raises(ValueError):
            pack(codes, bits)


def test_unpacking_and_dequantizing_agree_with_hands():
    codes = np.random.default_rng(0).integers(0, 4, (3, 8)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(packed_by_hand(codes, 2), 2), codes)
    grid = np.array([[[0.5, -1], [2, 3]], [[1, 0], [4, 1]]])  # two rows of two
    found = dequantize(codes[:, :2], grid, 2, "channel")
    expected = [[grid[t // 2, d, 0] * codes[t, d] + grid[t // 2, d, 1] for d in range(2)] for t in range(3)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.exercise("chapters.quantization.kv_cache.decode_attention", points=2)
class TestDecodeAttention:
    @given(steps(), st.sampled_from([None, 0.3, 0.0]))
    def test_is_attention_over_what_codes_and_window_stand_for(self, step, scale):
        found = decode_attention(step.q, step.keys.held, step.values.held, scale)
        assert found.dtype == np.float64 and found.shape == step.q.shape
        np.testing.assert_allclose(found, step.expected(scale), **tolerance(np.float64, 100, 10))

    def test_weighs_the_values_by_the_keys(self):
        q = np.array([[[[1.0, 0, 0, 0]]]])
        rng = np.random.default_rng(0)
        keys, values = (half(rng, (1, 1, 2, 4), 4, 4, "token", packed) for packed in (1, 2))
        found = decode_attention(q, keys.held, values.held, 1.0)
        share = 1 / (1 + np.exp(keys.numbers[0, 0, 1, 0] - keys.numbers[0, 0, 0, 0]))
        expected = share * values.numbers[0, 0, 0] + (1 - share) * values.numbers[0, 0, 1]
        np.testing.assert_allclose(found[0, 0, 0], expected, **tolerance(np.float64, 4))

    def test_scores_of_thousands_do_not_overflow(self):
        rng = np.random.default_rng(0)
        keys, values = (half(rng, (1, 1, 9, 8), 4, 8, "channel", 5) for _ in "kv")
        step = Step(1e4 * keys.numbers[:, :, 3:4], keys, values)
        found = decode_attention(step.q, keys.held, values.held)
        np.testing.assert_allclose(found, step.expected(), **tolerance(np.float64, 9, 10))

    @pytest.mark.parametrize(
        ("heads", "kv_heads", "batch", "new", "values"),
        [(1, 1, 1, 1, 4), (3, 2, 1, 1, 5), (1, 1, 2, 1, 5), (1, 1, 1, 2, 5), (1, 1, 1, 1, 0)],
    )
    def test_refuses_what_does_not_fit(self, heads, kv_heads, batch, new, values):
        rng, keys = np.random.default_rng(0), 5 if values else 0
        halves = [half(rng, (1, kv_heads, S, 8), 4, 8, "token", min(2, S)).held for S in (keys, values)]
        with pytest.raises(ValueError):
            decode_attention(np.ones((batch, heads, new, 8)), *halves)

    def test_refuses_another_head_size(self):
        part = half(np.random.default_rng(0), (1, 1, 5, 8), 4, 8, "token", 2).held
        with pytest.raises(ValueError):
            decode_attention(np.ones((1, 1, 1, 16)), part, part)

    def test_refuses_keys_and_values_of_different_heads(self):
        one, two = (half(np.random.default_rng(0), (1, heads, 5, 8), 4, 8, "token", 2).held for heads in (1, 2))
        for halves in ((one, two), (two, one)):
            with pytest.raises(ValueError):
                decode_attention(np.ones((1, 2, 1, 8)), *halves)


def test_refusals_say_what_is_wrong():
    for arguments, complaint in (
        ((np.ones((2, 4)), 4, 3, "token", "kivi"), "group_size must divide the 4 numbers per token, got 3"),
        ((np.ones((2, 4)), 4, 3, "row", "kivi"), "got 4, 3, row, kivi"),
        ((np.ones(4), 4, 4), r"x must be non-empty floating point .*, got float64 \(4,\)"),
        ((np.array([[6e4, -6e4]], np.float16), 4, 2), "x must be finite and its ranges fit float16, got -6"),
    ):
        with pytest.raises(ValueError, match=complaint):
            quantize(*arguments)
    with pytest.raises(ValueError, match="codes must be below 2\\^2, got 4"):
        pack(np.full(4, 4, np.uint8), 2)
    with pytest.raises(ValueError, match=r"need 2, 4 or 8 bits .* got 3, uint8 \(8,\)"):
        pack(np.ones(8, np.uint8), 3)
    part = half(np.random.default_rng(0), (1, 1, 5, 8), 4, 8, "token", 2).held
    with pytest.raises(ValueError, match=r"q \(1, 3, 2, 8\), keys \(1, 1, 5, 8\) and values \(1, 1, 5, 8\) do not fit"):
        decode_attention(np.ones((1, 3, 2, 8)), part, part)
    with pytest.raises(ValueError, match=r"codes \(1, 1, 5, 4\), of which 2 packed, .* do not fit heads of 16"):
        decode_attention(np.ones((1, 1, 1, 16)), part, part)


def on_device(held: tuple, dtype: torch.dtype = torch.float32, hold=poisoned) -> tuple:
    """The same half with tensors, its window in `dtype`."""
    codes, grid, window = (torch.from_numpy(part).to(DEVICE) for part in held[:3])
    return held._replace(codes=hold(codes), grid=hold(grid), window=hold(window.to(dtype)))


def run_kernel(step: Step, dtype: torch.dtype, scale: float | None = None, hold=poisoned, **blocks) -> np.ndarray:
    """What the kernel makes of a step, float64."""
    q = hold(torch.from_numpy(step.q).to(DEVICE, dtype))
    halves = (on_device(part.held, dtype, hold) for part in (step.keys, step.values))
    found = kv_cache.decode_attention(q, *halves, scale, **blocks)
    assert found.dtype is dtype and found.shape == q.shape
    return found.double().cpu().numpy()


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.kv_cache.decode_kernel", points=4)
class TestKernel:
    @settings(max_examples=20)
    @given(
        steps(one_room=True), st.sampled_from([16, 32]), st.sampled_from([1, 2, 3]), st.sampled_from(KERNEL_DTYPES),
        st.sampled_from([None, 0.1]),
    )  # fmt: skip
    def test_equals_the_reference(self, step, block, shares, dtype, scale):
        if np.abs(step.q).max() > 10:  # where keys are rounded to 16 bits, scores of hundreds move by more than one
            dtype = torch.float32
        found = run_kernel(step, dtype, scale, block=block, shares=shares)
        expected = oracle("quantization.kv_cache").decode_attention(step.q, step.keys.held, step.values.held, scale)
        np.testing.assert_allclose(found, expected, **tolerance(dtype, 40))

    @pytest.mark.parametrize("packed", [(0, 0), (33, 33), (33, 1), (16, 32), (17, 0)])
    def test_finds_each_position_in_codes_or_window(self, packed):
        rng = np.random.default_rng(0)
        keys, values = (half(rng, (1, 2, 33, 16), 4, 8, "channel", p, 36 - p) for p in packed)
        q = rng.standard_normal((1, 4, 1, 16)).astype(np.float32)
        step = Step(q, keys, values)
        for shares in (1, 3):
            found = run_kernel(step, torch.float32, block=16, shares=shares)
            np.testing.assert_allclose(found, step.expected(), **tolerance(np.float32, 33))

    def test_a_late_large_score_outweighs_all_before(self):
        rng = np.random.default_rng(0)
        keys, values = (half(rng, (1, 1, 40, 16), 4, 16, "token", p, 43 - p) for p in (30, 36))
        for largest in (39, 5, 20):
            keys.held.window[:], keys.numbers[0, 0, 30:] = 0, 0
            q = 300 * keys.numbers[:, :, largest : largest + 1] if largest < 30 else np.full((1, 1, 1, 16), 300.0)
            if largest >= 30:
                keys.held.window[0, 0, largest - 30], keys.numbers[0, 0, largest] = 2, 2
            step = Step(q.astype(np.float32), keys, values)
            found = run_kernel(step, torch.float32, block=16, shares=1)
            np.testing.assert_allclose(found, step.expected(), **tolerance(np.float32, 40, 10))

    @pytest.mark.parametrize("begins", [False, True])
    def test_loads_nothing_outside_of_its_inputs(self, begins):
        rng = np.random.default_rng(0)
        keys, values = (half(rng, (1, 1, 21, 24), 4, 8, per, p, 20 - p) for per, p in (("token", 20), ("channel", 19)))
        step = Step(rng.standard_normal((1, 3, 1, 24)).astype(np.float32), keys, values)
        found = run_kernel(step, torch.float32, hold=lambda x: walled(x, begins), block=16, shares=2)
        np.testing.assert_allclose(found, step.expected(), **tolerance(np.float32, 21))


@pytest.mark.kernel
class TestWrapper:
    def test_its_own_configuration_serves_any_shape(self):
        rng = np.random.default_rng(0)
        for S, dtype in ((1, torch.float16), (300, torch.float32)):
            keys, values = (half(rng, (1, 1, S, 16), 2, 16, "token", p, S - p) for p in (S - 1, S // 2))
            step = Step(rng.standard_normal((1, 2, 1, 16)).astype(np.float16).astype(np.float32), keys, values)
            np.testing.assert_allclose(run_kernel(step, dtype), step.expected(), **tolerance(dtype, S))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("heads", [1, 8, 128, 512])
    def test_no_share_is_empty(self, heads, dtype):
        for length in (1, 128, 129, 4096, 10**6):
            chosen = kv_cache.configuration(heads, length, dtype)
            assert 1 <= chosen["shares"] <= max(1, -(-length // chosen["block"]) // 2)

    def test_plain_torch_expands_alike(self):
        part = half(np.random.default_rng(0), (2, 2, 21, 24), 2, 16, "token", 13)
        found = kv_cache.expand(on_device(part.held), torch.float32)
        np.testing.assert_allclose(found.cpu().numpy(), part.numbers, **tolerance(np.float32))

    @pytest.mark.parametrize(
        ("changed", "error", "complaint"),
        [
            ({"q": torch.ones(1, 2, 2, 16)}, ValueError, r"q must be \[B, H, 1, D\], got \(1, 2, 2, 16\)"),
            ({"q": torch.ones(1, 3, 1, 16)}, ValueError, "q's heads must be a multiple of the cache's, got 3 and 2"),
            ({"q": torch.ones(1, 2, 1, 24)}, ValueError, r"keys.codes must be .* D=24, bits 2, 4 or 8"),
            ({"q": torch.ones(2, 2, 1, 16)}, ValueError, r"keys.codes must be \[2, Hkv"),
            ({"q": torch.ones(1, 2, 1, 16).double()}, TypeError, "q must have dtype"),
            ({"packed": 9}, ValueError, "keys.packed must be from 0 to capacity=8, got 9"),
            ({"packed": 3}, ValueError, r"must be as many positions, and some, got \[5, 7\]"),
            ({"group_size": 12}, ValueError, "keys.group_size must be a power of two, got 12"),
            ({"group_size": 4}, ValueError, r"keys.grid must be \(1, 2, 8, 4, 2\) per token, got \(1, 2, 8, 2, 2\)"),
            ({"per": "row"}, ValueError, "keys.per must be 'token' or 'channel', got 'row'"),
            ({"window": torch.ones(1, 2, 2, 8)}, ValueError, "keys.window must be"),
            ({"window": torch.ones(2)}, ValueError, "keys.window must be"),
            ({"window": torch.ones(1, 2, 2, 16).int()}, TypeError, "keys.window must have dtype"),
            ({"codes": torch.ones(1, 2, 8, 8)}, TypeError, "keys.codes must have dtype"),
            ({"codes": torch.zeros(1, 2, 8, 6, dtype=torch.uint8)}, ValueError, "keys.codes must be"),
            ({"grid": torch.ones(1, 2, 8, 2, 4)[..., ::2]}, ValueError, "keys.grid must be contiguous"),
        ],
    )
    def test_names_what_it_refuses(self, changed, error, complaint):
        given_ = on_device(half(np.random.default_rng(0), (1, 2, 7, 16), 4, 8, "token", 5).held, hold=lambda x: x)
        q = changed.pop("q", torch.ones(1, 2, 1, 16))
        with pytest.raises(error, match=complaint):
            kv_cache.decode_attention(q, given_._replace(**changed), given_)
