"""Weight-only product: the packed layout bit by bit, the product against the dense one, the kernel against both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.quantization.weight_only import pack, unpack, weight_only_matmul
from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.quantization.problems import packed_by_hand, products

weight_only = kernel("quantization.weight_only")
SEEDS = st.integers(0, 2**32 - 1)


SPANS = {2: 64, 3: 128, 4: 32}  # columns that are packed together
BITS = st.sampled_from([2, 3, 4])


def drawn_codes(seed: int, rows: int, spans: int, bits: int = 4) -> np.ndarray:
    """Codes `[rows, columns]` uint8."""
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, SPANS[bits] * spans)).astype(np.uint8)


@pytest.mark.exercise("chapters.quantization.weight_only.pack", points=3)
class TestPack:
    @given(SEEDS, st.integers(1, 5), st.integers(1, 5), BITS, st.sampled_from([np.uint8, np.int8, np.int64]))
    def test_puts_every_bit_in_its_place(self, seed, rows, spans, bits, dtype):
        codes = drawn_codes(seed, rows, spans, bits).astype(dtype)
        packed = pack(codes, bits)
        assert packed.dtype == np.int32 and packed.shape == (rows, codes.shape[1] * bits // 32)
        np.testing.assert_array_equal(packed, packed_by_hand(codes, bits))

    @given(SEEDS, st.integers(1, 5), st.integers(1, 5), BITS)
    def test_unpacking_gives_the_codes_back(self, seed, rows, spans, bits):
        codes = drawn_codes(seed, rows, spans, bits)
        np.testing.assert_array_equal(unpack(pack(codes, bits), bits), codes)

    def test_packs_four_bits_unless_told(self):
        codes = drawn_codes(0, 2, 3)
        np.testing.assert_array_equal(pack(codes), packed_by_hand(codes, 4))

    def test_leaves_the_codes_alone(self):
        codes = np.arange(128, dtype=np.uint8)[None] % 8
        pack(codes, 3)
        np.testing.assert_array_equal(codes, np.arange(128)[None] % 8)

    def test_does_not_ask_how_codes_lie_in_memory(self):
        codes = np.repeat(drawn_codes(0, 3, 2, 3), 2, axis=0)
        for given_ in (np.asfortranarray(codes), codes[::2], codes[::-1]):
            np.testing.assert_array_equal(pack(given_, 3), packed_by_hand(given_, 3))

    @pytest.mark.parametrize(
        ("columns", "bits"), [(1, 4), (8, 4), (24, 4), (33, 4), (32, 2), (96, 2), (64, 3), (96, 3)]
    )
    def test_refuses_half_a_load(self, columns, bits):
        with pytest.raises(ValueError):
            pack(np.zeros((2, columns), np.uint8), bits)

    @pytest.mark.parametrize(("shape", "dtype"), [((32,), int), ((0, 32), int), ((1, 1, 32), int), ((1, 32), float)])
    def test_refuses_what_is_no_matrix_of_integers(self, shape, dtype):
        with pytest.raises(ValueError):
            pack(np.zeros(shape, dtype))

    @pytest.mark.parametrize(("code", "bits"), [(16, 4), (255, 4), (-1, 4), (8, 3), (4, 2), (-1, 2)])
    def test_refuses_what_is_no_code(self, code, bits):
        codes = np.zeros((2, 128), np.int64)
        codes[1, 7] = code
        with pytest.raises(ValueError):
            pack(codes, bits)

    @pytest.mark.parametrize("bits", [0, 1, 5, 8])
    def test_refuses_other_widths(self, bits):
        with pytest.raises(ValueError):
            pack(np.zeros((1, 128), np.uint8), bits)


class TestUnpack:
    @given(SEEDS, st.integers(1, 5), st.integers(1, 5), BITS)
    def test_reads_what_was_packed_by_hand(self, seed, rows, spans, bits):
        codes = drawn_codes(seed, rows, spans, bits)
        found = unpack(packed_by_hand(codes, bits), bits)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, codes)

    def test_nibble_i_of_word_w_is_column_4i_plus_w(self):
        words = np.array([[1, 2, 3 << 4, 15 << 28, 4, 0, 0, 0]], np.uint32)
        expected = np.zeros((1, 64), np.uint8)
        expected[0, [0, 1, 6, 31, 32]] = [1, 2, 3, 15, 4]
        np.testing.assert_array_equal(unpack(words.view(np.int32)), expected)
        np.testing.assert_array_equal(packed_by_hand(expected), words.view(np.int32))

    def test_two_bits_put_a_second_run_into_the_upper_halves(self):
        words = np.array([[1, 2, 3 << 4, 3 << 28 | 2 << 30]], np.uint32)
        expected = np.zeros((1, 64), np.uint8)
        expected[0, [0, 1, 6, 31, 63]] = [1, 2, 3, 3, 2]
        np.testing.assert_array_equal(unpack(words.view(np.int32), 2), expected)
        np.testing.assert_array_equal(packed_by_hand(expected, 2), words.view(np.int32))

    def test_three_bits_keep_the_top_bits_of_four_runs_at_the_end_of_a_row(self):
        words = np.zeros((1, 24), np.uint32)  # two spans: their first quads, their second, the top bits of both
        words[0, [0, 4, 8 + 1, 16 + 2, 20 + 3]] = [1, 2 << 2, 3 << 4, 1 << 4 | 2, 8 << 28]
        expected = np.zeros((1, 256), np.uint8)
        expected[0, [0, 128 + 32, 64 + 5, 6, 32 + 2, 128 + 96 + 31]] = [1, 2, 3, 4, 4, 4]
        np.testing.assert_array_equal(unpack(words.view(np.int32), 3), expected)
        np.testing.assert_array_equal(packed_by_hand(expected, 3), words.view(np.int32))


@pytest.mark.exercise("chapters.quantization.weight_only.weight_only_matmul", points=2)
class TestProduct:
    @given(products(tokens=st.integers(1, 4)))
    def test_is_that_with_each_dequantized_weight(self, product):
        found = weight_only_matmul(product.x, *product.weights())
        expected = np.zeros((len(product.x), len(product.codes)))
        for row, column in np.ndindex(*product.codes.shape):
            group = column // product.group_size
            value = float(product.scale[row, group]) * (int(product.codes[row, column]) - int(product.zero[row, group]))
            expected[:, row] += product.x[:, column].astype(float) * value
        assert found.dtype == np.float64 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, **tolerance(np.float64, product.codes.shape[1], 10))

    @given(products(tokens=st.integers(1, 4)), st.sampled_from([np.float16, np.float32, np.float64]))
    def test_converts_to_float64_first(self, product, dtype):
        x, packed, scale, zero = product.arrays()
        given_ = x.astype(dtype), scale.astype(dtype), zero.astype(dtype)
        found = weight_only_matmul(given_[0], packed, *given_[1:], product.group_size, product.bits)
        inputs, steps, offsets = (torch.from_numpy(part.astype(np.float64)) for part in given_)
        codes = torch.from_numpy(product.codes).double().unflatten(1, (-1, product.group_size))
        dense = (steps[..., None] * (codes - offsets[..., None])).flatten(1)
        expected = torch.nn.functional.linear(inputs, dense).numpy()
        np.testing.assert_allclose(found, expected, **tolerance(np.float64, codes[0].numel(), 10))

    def test_takes_four_bits_unless_told(self):
        codes = drawn_codes(0, 2, 4)
        x, ones = np.random.default_rng(0).standard_normal((3, 128)), np.ones((2, 1))
        found = weight_only_matmul(x, packed_by_hand(codes), ones, 7 * ones, 128)
        np.testing.assert_allclose(found, x @ (codes.astype(float) - 7).T, **tolerance(np.float64, 128, 10))

    @pytest.mark.parametrize(
        ("x", "scale", "zero", "group_size"),
        [
            ((1, 31), (2, 1), (2, 1), 32),
            ((32,), (2, 1), (2, 1), 32),
            ((1, 32), (2, 1), (2, 1), 16),
            ((1, 32), (2, 1), (2, 1), 0),
            ((1, 32), (1, 1), (1, 1), 32),
            ((1, 32), (2, 1), (2, 2), 32),
            ((1, 32), (1, 2), (1, 2), 16),
            ((1, 32), (2,), (2,), 16),
            ((1, 1, 32), (2, 1), (2, 1), 32),
        ],
    )
    def test_refuses_shapes_that_do_not_fit(self, x, scale, zero, group_size):
        with pytest.raises(ValueError):
            weight_only_matmul(np.ones(x), np.zeros((2, 4), np.int32), np.ones(scale), np.ones(zero), group_size)

    @pytest.mark.parametrize(("words", "bits"), [(4, 3), (12, 2), (12, 4), (4, 1), (4, 0)])
    def test_refuses_a_width_that_does_not_fit(self, words, bits):
        grids = np.ones((2, 1)), np.ones((2, 1))
        with pytest.raises(ValueError):
            weight_only_matmul(np.ones((1, 128)), np.zeros((2, words), np.int32), *grids, 128, bits)


def test_refusals_say_what_is_wrong():
    for codes, complaint in (
        (np.zeros((2, 24), np.uint8), r"codes must be integers \[out, 32 k\], got uint8 \(2, 24\)"),
        (np.zeros(32, np.uint8), r"got uint8 \(32,\)"),
        (np.zeros((0, 32), np.uint8), r"got uint8 \(0, 32\)"),
        (np.zeros((1, 32)), r"got float64 \(1, 32\)"),
        (np.full((1, 32), 16), "codes must be from 0 to 15, got 16 to 16"),
    ):
        with pytest.raises(ValueError, match=complaint):
            pack(codes)
    with pytest.raises(ValueError, match="bits must be 2, 3 or 4, got 5"):
        pack(np.zeros((1, 128), np.uint8), 5)
    with pytest.raises(ValueError, match="codes must be from 0 to 7, got 8 to 8"):
        pack(np.full((1, 128), 8), 3)
    with pytest.raises(ValueError, match=r"packed must be int32 \[out, 12 k\], got int32 \(2, 4\)"):
        unpack(np.zeros((2, 4), np.int32), 3)
    with pytest.raises(ValueError, match=r"packed must be int32 .*, got int64 \(2, 4\)"):
        weight_only_matmul(np.ones((1, 32)), np.zeros((2, 4), np.int64), np.ones((2, 1)), np.ones((2, 1)), 32)
    with pytest.raises(ValueError, match=r"packed must be int32 .*, got int32 \(2, 3\)"):
        unpack(np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match=r"x \(1, 31\), packed \(2, 4\), scale \(2, 1\), zero \(2, 1\) do not fit"):
        weight_only_matmul(np.ones((1, 31)), np.zeros((2, 4), np.int32), np.ones((2, 1)), np.ones((2, 1)), 32)


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.weight_only.matvec_kernel", points=3)
class TestMatvecKernel:
    @settings(max_examples=20)
    @given(
        products(tokens=st.just(1)), st.sampled_from([8, 16]), st.sampled_from([64, 256]),
        st.sampled_from(KERNEL_DTYPES), st.booleans(),
    )  # fmt: skip
    def test_equals_the_reference(self, product, block_n, block_k, dtype, aligned):
        x, *weights = (torch.from_numpy(part).to(DEVICE) for part in product.arrays())
        held = [poisoned(part, aligned) for part in (x.to(dtype), *weights)]
        blocks = {"block_n": block_n, "block_k": block_k}
        found = weight_only.weight_only_matmul(*held, product.group_size, product.bits, **blocks)
        expected = oracle("quantization.weight_only").weight_only_matmul(
            held[0].double().cpu().numpy(), *product.weights()
        )
        close = tolerance(dtype, product.x.shape[1], scale=product.largest_term())
        np.testing.assert_allclose(found.double().cpu().numpy(), expected, **close)

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_meets_each_code_with_its_own_activation(self, bits):
        codes = drawn_codes(0, 3, 256 // SPANS[bits], bits)
        packed = torch.from_numpy(oracle("quantization.weight_only").pack(codes, bits)).to(DEVICE)
        ones, zeros = torch.ones(3, 8, device=DEVICE), torch.zeros(3, 8, dtype=torch.uint8, device=DEVICE)
        for column in (0, 1, 4, 31, 32, 95, 255):
            x = torch.eye(256, device=DEVICE)[column : column + 1].contiguous()
            found = weight_only.weight_only_matmul(x, packed, ones, zeros, 32, bits)
            np.testing.assert_array_equal(found[0].cpu().numpy(), codes[:, column])

    @settings(max_examples=10)  # the interpreter is slow
    @given(products(tokens=st.just(1)), st.sampled_from(KERNEL_DTYPES), st.sampled_from(KERNEL_DTYPES))
    def test_rounds_nothing_but_the_result(self, product, dtype, scale_dtype):
        x, packed, scale, zero = (torch.from_numpy(part).to(DEVICE) for part in product.arrays())
        x, scale = x.to(dtype), scale.to(scale_dtype)
        blocks = {"block_n": 16, "block_k": 128}
        found = weight_only.weight_only_matmul(x, packed, scale, zero, product.group_size, product.bits, **blocks)
        x, scale, zero = (part.double().cpu().numpy() for part in (x, scale, zero))
        steps, offsets = (grid.repeat(product.group_size, axis=1) for grid in (scale, zero))
        expected = x @ (steps * (product.codes - offsets)).T
        terms = 256 * np.abs(x) @ steps.T  # a code is first summed with a bias that is worth 256 steps
        lost = torch.finfo(dtype).eps / 2 * np.abs(expected) + 2.0**-22 * terms
        assert found.dtype is dtype and (np.abs(found.double().cpu().numpy() - expected) <= lost).all()

    @pytest.mark.parametrize(("scale", "x"), [(1e-9, 2.0**15), (1e6, 2.0**-10)])
    def test_a_scale_need_not_fit_the_precision_of_x(self, scale, x):
        packed = torch.full((1, 4), 0x11111111, dtype=torch.int32, device=DEVICE)
        steps, zero = (torch.full((1, 1), part, device=DEVICE) for part in (scale, 0.0))
        vector = torch.full((1, 32), x, dtype=torch.float16, device=DEVICE)
        found = weight_only.weight_only_matmul(vector, packed, steps, zero.byte(), 32)
        assert found.item() == pytest.approx(32 * scale * x, rel=1e-3)

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", ["x", "packed", "scale", "zero"])
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        given_ = arguments(x=torch.ones(1, 96), packed=torch.zeros(3, 12, dtype=torch.int32), scale=torch.ones(3, 3))
        given_["zero"] = torch.ones(3, 3, dtype=torch.uint8)
        held = {name: part.to(DEVICE) for name, part in given_.items() if isinstance(part, torch.Tensor)}
        held[which] = walled(held[which], begins)
        found = weight_only.weight_only_matmul(**held, group_size=32, block_n=8, block_k=256)
        np.testing.assert_array_equal(found.cpu().numpy(), np.full((1, 3), -96.0))


@pytest.mark.kernel
class TestKernel:
    @settings(max_examples=20)
    @given(
        products(tokens=st.sampled_from([2, 3, 16, 17, 33])), st.sampled_from([1, 2, 4]), st.sampled_from([16, 32]),
        st.sampled_from(KERNEL_DTYPES), st.booleans(),
    )  # fmt: skip
    def test_matmul_equals_the_reference(self, product, splits, block, dtype, aligned):
        x, *weights = (torch.from_numpy(part).to(DEVICE) for part in product.arrays())
        held = [poisoned(part, aligned) for part in (x.to(dtype), *weights)]
        blocks = {"block_m": block, "block_n": 16, "block_k": 32, "splits": splits}
        found = weight_only.weight_only_matmul(*held, product.group_size, product.bits, **blocks)
        expected = oracle("quantization.weight_only").weight_only_matmul(
            held[0].double().cpu().numpy(), *product.weights()
        )
        close = tolerance(dtype, product.x.shape[1], scale=product.largest_term())
        np.testing.assert_allclose(found.double().cpu().numpy(), expected, **close)
        assert found.dtype is dtype

    @pytest.mark.parametrize("dtype", KERNEL_DTYPES)
    @pytest.mark.parametrize(
        ("tokens", "rows", "bits"), [(1, 70, 4), (5, 70, 4), (40, 3, 4), (1, 70, 3), (5, 70, 3), (40, 3, 3), (40, 3, 2)]
    )
    def test_its_own_configuration_serves_any_shape(self, tokens, rows, bits, dtype):
        rng = np.random.default_rng(0)
        packed = torch.from_numpy(rng.integers(-(2**31), 2**31, (rows, 12 * bits)).astype(np.int32)).to(DEVICE)
        scale = torch.full((rows, 4), 0.5, device=DEVICE)
        zero = torch.full((rows, 4), 3, dtype=torch.uint8, device=DEVICE)
        x = torch.from_numpy(rng.integers(-3, 4, (tokens, 384))).to(DEVICE, torch.float32)
        found = weight_only.weight_only_matmul(x.to(dtype), packed, scale, zero, 96, bits)
        expected = x @ weight_only.dequantize(packed, scale, zero, 96, torch.float32, bits).T
        assert torch.equal(found, expected.to(dtype)), "sums of halves are exact in any order"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    @pytest.mark.parametrize("rows", [1, 9, 4096])
    @pytest.mark.parametrize("tokens", [1, 2, 16, 17, 512, 5000])
    def test_configurations_divide_groups_and_leave_no_split_empty(self, tokens, rows, dtype):
        for columns, group, bits in ((32, 32, 4), (96, 96, 4), (4096, 128, 4), (11008, 11008, 2), (384, 32, 3)):
            chosen = weight_only.configuration(tokens, rows, columns, group, dtype, bits)
            assert tokens == 1 or group % chosen["block_k"] == 0 or chosen["block_k"] == SPANS[bits]
            assert chosen["block_k"] % SPANS[bits] == 0
            assert chosen["splits"] <= max(1, columns // chosen["block_k"])
            powers = {part: value for part, value in chosen.items() if part != "stages"}
            assert all(value & (value - 1) == 0 for value in powers.values()), "Triton's tiles are powers of two"

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_plain_torch_unpacks_alike(self, bits):
        words = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 8 * bits)).astype(np.int32)
        np.testing.assert_array_equal(weight_only.unpack(torch.from_numpy(words), bits).numpy(), unpack(words, bits))


def arguments(**changed) -> dict:
    given_ = {
        "x": torch.ones(2, 64),
        "packed": torch.zeros(3, 8, dtype=torch.int32),
        "scale": torch.ones(3, 2),
        "zero": torch.zeros(3, 2, dtype=torch.uint8),
        "group_size": 32,
    }
    return given_ | changed


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"x": torch.ones(64)}, ValueError, "must be matrices"),
        ({"x": torch.ones(0, 64)}, ValueError, "must not be empty"),
        ({"x": torch.ones(2, 32)}, ValueError, r"packed must be \[N, K bits / 32\] with K=32, bits=4, got \(3, 8\)"),
        ({"bits": 5}, ValueError, "bits must be 2, 3 or 4, got 5"),
        ({"bits": 3}, ValueError, "K must be a multiple of 128 for 3 bits, got 64"),
        ({"bits": 2}, ValueError, r"packed must be \[N, K bits / 32\] with K=64, bits=2, got \(3, 8\)"),
        ({"group_size": 16}, ValueError, "group_size must be a multiple of 32 that divides K=64, got 16"),
        ({"group_size": 96}, ValueError, "got 96"),
        ({"group_size": 0}, ValueError, "got 0"),
        ({"scale": torch.ones(3, 1)}, ValueError, r"scale must be .* \(3, 2\), got \(3, 1\)"),
        ({"zero": torch.zeros(2, 3, dtype=torch.uint8)}, ValueError, "zero must be"),
        ({"zero": torch.zeros(3, 2)}, TypeError, "zero must have dtype torch.uint8"),
        ({"packed": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "packed must have dtype torch.int32"),
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, TypeError, "x must have dtype"),
        ({"x": torch.ones(64, 2).T}, ValueError, "x must be contiguous"),
        ({"block_k": 64}, ValueError, "block_k=64 must divide group_size=32"),
    ],
)
def test_the_wrapper_names_what_it_refuses(changed, error, complaint):
    with pytest.raises(error, match=complaint):
        weight_only.weight_only_matmul(**arguments(**changed))
