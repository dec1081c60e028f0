"""LUT-GEMM: signs and scales against their definitions and the released code, look-ups against sums, the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import lut_gemm as chapter
from chapters.quantization.lut_gemm import BinaryCoded, greedy, lut_gemm, nearest_signs, pack, refine
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.quantization.problems import layers

kernels = kernel("quantization.lut_gemm")
SEEDS = st.integers(0, 2**32 - 1)
PLANES = st.sampled_from([1, 2, 3, 4])


def packed_by_hand(signs: np.ndarray) -> np.ndarray:
    """Bit j of word [p, r, w, i]: plane p of row 4 r + i and column 32 w + j."""
    rows, columns, planes = signs.shape
    words = np.zeros((planes, -(-rows // 4), columns // 32, 4), np.uint32)
    for row, column, plane in np.ndindex(signs.shape):
        if signs[row, column, plane] > 0:
            words[plane, row // 4, column // 32, row % 4] += np.uint32(2 ** (column % 32))
    return words.view(np.int32)


@dataclass(frozen=True)
class Problem:
    """x `[tokens, in]`, signs `[out, in, planes]`, alpha `[out, groups, planes]`, offset `[out, groups]` or None."""

    x: np.ndarray
    signs: np.ndarray
    alpha: np.ndarray
    offset: np.ndarray | None

    @property
    def group_size(self) -> int:
        return self.signs.shape[1] // self.alpha.shape[1]

    def arrays(self) -> tuple:
        return self.x, packed_by_hand(self.signs), self.alpha, self.offset

    def weight(self) -> np.ndarray:
        """Dense weights, float64 `[out, in]`, one by one."""
        dense = np.zeros(self.signs.shape[:2])
        for row, column in np.ndindex(dense.shape):
            group = column // self.group_size
            dense[row, column] = 0 if self.offset is None else self.offset[row, group]
            for sign, scale in zip(self.signs[row, column], self.alpha[row, group], strict=True):
                dense[row, column] += float(scale) if sign > 0 else -float(scale)
        return dense

    def largest_term(self) -> float:
        """No product that is summed is larger."""
        return float(np.abs(self.x).max()) * (self.alpha.sum(-1).max() + 1)


@st.composite
def problems(draw, tokens=1) -> Problem:
    """Rows, groups and words of 32 columns, few of them a power of two."""
    rng = np.random.default_rng(draw(SEEDS))
    rows, groups, words = (draw(st.sampled_from(sizes)) for sizes in ([1, 3, 4, 5, 9], [1, 2, 3], [1, 2]))
    planes, wide = draw(PLANES), 32 * groups * words
    return Problem(
        x=rng.standard_normal((tokens, wide)).astype(np.float32),
        signs=rng.choice([-1, 1], (rows, wide, planes)).astype(np.int8),
        alpha=rng.uniform(0.1, 1, (rows, groups, planes)).astype(np.float32),
        offset=rng.uniform(-1, 1, (rows, groups)).astype(np.float32) if draw(st.booleans()) else None,
    )


def error_of_groups(weight: np.ndarray, coded: BinaryCoded) -> np.ndarray:
    """Squared error in each group `[out, groups]`."""
    rows, groups, planes = coded.alpha.shape
    values = np.einsum("ogkp,ogp->ogk", coded.signs.reshape(rows, groups, -1, planes).astype(float), coded.alpha)
    return np.square(weight.reshape(values.shape) - values - coded.offset[..., None]).sum(axis=-1)


@pytest.mark.exercise("chapters.quantization.lut_gemm.greedy", points=1)
class TestGreedy:
    @given(layers(columns=(1, 7, 12)), PLANES, st.sampled_from([None, 1, 3]))
    def test_takes_signs_and_mean_sizes_of_what_is_left(self, layer, bits, group_size):
        rows, columns = layer.weight.shape
        group_size = None if group_size and columns % group_size else group_size
        size, largest = group_size or columns, np.abs(layer.weight).max()
        found = greedy(layer.weight, bits, group_size)
        assert found.signs.dtype == np.int8 and found.signs.shape == (rows, columns, bits)
        assert found.alpha.shape == (rows, columns // size, bits)
        assert found.offset.shape == (rows, columns // size) and not found.offset.any()
        for row, group, plane in np.ndindex(found.alpha.shape):
            cut = np.s_[row, group * size : (group + 1) * size]
            rest = layer.weight[cut] - found.signs[cut][:, :plane] @ found.alpha[row, group, :plane]
            mean = sum(abs(value) for value in rest) / size
            np.testing.assert_allclose(found.alpha[row, group, plane], mean, **tolerance(float, size, largest))
            clear = np.abs(rest) > 1e-13 * largest  # the signs of rounding errors are free
            np.testing.assert_array_equal(found.signs[cut][clear, plane], np.sign(rest[clear]))

    def test_zero_is_positive(self):
        found = greedy(np.array([[0.0, 1.0, -1.0, 2.0], [0, 0, 0, 0]]), 2)
        np.testing.assert_array_equal(found.signs[0], [[1, -1], [1, 1], [-1, 1], [1, 1]])
        np.testing.assert_array_equal(found.alpha, [[[1, 0.5]], [[0, 0]]])
        assert (found.signs[1] == 1).all()

    def test_computes_in_float64_and_leaves_the_weight_alone(self):
        weight = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float16)
        wide = weight.astype(float)
        found, expected = greedy(weight, 3), greedy(wide, 3)
        assert found.alpha.dtype == found.offset.dtype == np.float64 and (wide == weight).all()
        np.testing.assert_array_equal(found.alpha, expected.alpha)

    @pytest.mark.parametrize(("weight", "bits", "size"), [(np.ones((1, 4)), 0, None), (np.ones((1, 4)), 9, None),
        (np.ones((1, 4)), 2, 3), (np.ones(4), 2, None), (np.full((1, 4), np.nan), 2, None)])  # fmt: skip
    def test_refuses_what_it_cannot_code(self, weight, bits, size):
        with pytest.raises(ValueError):
            greedy(weight, bits, size)


@pytest.mark.exercise("chapters.quantization.lut_gemm.nearest_signs", points=2)
class TestNearestSigns:
    @given(SEEDS, PLANES)
    def test_finds_the_nearest_of_all_sums_and_takes_the_upper_of_two(self, seed, planes):
        rng = np.random.default_rng(seed)
        alpha = -np.sort(-rng.integers(0, 9, (3, planes)))  # small integers: every sum and tie is exact
        values = rng.integers(-40, 40, (3, 17)) / 2.0
        signs = nearest_signs(values, alpha.astype(float))
        assert signs.dtype == np.int8 and signs.shape == (3, 17, planes) and (np.abs(signs) == 1).all()
        for row, column in np.ndindex(values.shape):
            sums = [
                sum(s * a for s, a in zip(choice, alpha[row], strict=True))
                for choice in product([-1, 1], repeat=planes)
            ]
            best = min(abs(values[row, column] - total) for total in sums)
            expected = max(total for total in sums if abs(values[row, column] - total) == best)
            assert signs[row, column] @ alpha[row] == expected

    def test_the_order_of_sums_need_not_be_that_of_the_signs(self):
        alpha = np.array([4.0, 3, 2])  # −4 + 3 + 2 lies above 4 − 3 − 2
        found = nearest_signs(np.array([-9.0, -1.2, 0.9, 1.1, 0]), alpha)
        np.testing.assert_array_equal(found @ alpha, [-9, -1, 1, 1, 1])

    def test_serves_any_leading_axes(self):
        values, alpha = np.array([[[-2.0, 0, 5]], [[1.5, -9, 0.5]]]), np.array([[[2.0, 1]], [[1.0, 0.5]]])
        found = nearest_signs(values, alpha)
        np.testing.assert_array_equal((found * alpha[..., None, :]).sum(-1), [[[-1, 1, 3]], [[1.5, -1.5, 0.5]]])

    def test_where_all_scales_are_zero_the_sign_of_the_value_decides(self):
        for planes in (3, 8):
            found = nearest_signs(np.array([-1.0, 0.0, 1.0]), np.zeros(planes))
            np.testing.assert_array_equal(found, [[-1] * planes, [1] * planes, [1] * planes])


@pytest.mark.exercise("chapters.quantization.lut_gemm.refine", points=2)
class TestRefine:
    @pytest.fixture(autouse=True)
    def only_refine(self, monkeypatch):
        """Whatever else is written yet or not, its signs are the book's."""
        monkeypatch.setattr(chapter, "nearest_signs", oracle("quantization.lut_gemm").nearest_signs)

    def start(self, rng, rows=3, groups=2, size=24, planes=3) -> tuple[np.ndarray, BinaryCoded]:
        signs = rng.choice([-1, 1], (rows, groups * size, planes)).astype(np.int8)
        alpha, offset = rng.uniform(0, 1, (rows, groups, planes)), rng.standard_normal((rows, groups))
        return rng.standard_normal((rows, groups * size)), BinaryCoded(signs, alpha, offset)

    @pytest.mark.parametrize("seed", range(5))
    def test_scales_are_least_squares_made_positive_and_sorted(self, seed):
        weight, coded = self.start(np.random.default_rng(seed))
        found = refine(weight, coded)
        for row, group in np.ndindex(coded.offset.shape):
            cut = np.s_[row, 24 * group : 24 * group + 24]
            best = np.linalg.lstsq(coded.signs[cut].astype(float), weight[cut] - coded.offset[row, group])[0]
            np.testing.assert_allclose(found.alpha[row, group], sorted(np.abs(best))[::-1], rtol=1e-9)
        np.testing.assert_array_equal(found.offset, coded.offset)

    @pytest.mark.parametrize("seed", range(5))
    def test_signs_are_the_nearest_for_the_new_scales(self, seed):
        weight, coded = self.start(np.random.default_rng(seed))
        found = refine(weight, coded)
        assert found.signs.dtype == np.int8 and found.signs.shape == coded.signs.shape
        target = weight.reshape(3, 2, 24) - coded.offset[..., None]
        expected = oracle("quantization.lut_gemm").nearest_signs(target, found.alpha)
        np.testing.assert_array_equal(found.signs.reshape(expected.shape), expected)

    @given(layers(columns=(1, 2, 7, 12, 24)), PLANES)
    def test_the_error_of_no_group_grows(self, layer, bits):
        coded = oracle("quantization.lut_gemm").greedy(layer.weight, bits)
        before, size = error_of_groups(layer.weight, coded), np.square(layer.weight).sum(axis=1, keepdims=True)
        for _ in range(4):
            coded = refine(layer.weight, coded)
            after = error_of_groups(layer.weight, coded)
            assert (after <= before + 1e-12 * size).all() and np.isfinite(coded.alpha).all()
            before = after

    def test_where_planes_coincide_it_moves_as_little_as_it_must(self):
        signs = np.ones((1, 4, 2), np.int8)
        found = refine(np.full((1, 4), 6.0), BinaryCoded(signs, np.array([[[3.0, 1.0]]]), np.zeros((1, 1))))
        np.testing.assert_allclose(found.alpha, [[[4, 2]]])

    def test_changes_nothing_that_it_is_given(self):
        weight, coded = self.start(np.random.default_rng(0))
        copies = weight.copy(), coded.signs.copy(), coded.alpha.copy(), coded.offset.copy()
        refine(weight, coded)
        for given_, copy in zip((weight, coded.signs, coded.alpha, coded.offset), copies, strict=True):
            np.testing.assert_array_equal(given_, copy)

    def test_refuses_a_weight_of_another_shape(self):
        weight, coded = self.start(np.random.default_rng(0))
        with pytest.raises(ValueError):
            refine(weight[:, :24], coded)


class TestReleasedCode:
    """Equal to it bit for bit, but for the one group in which greedy meets a 0, whose sign it leaves 0."""

    @pytest.mark.parametrize("bits", [2, 3, 4])
    @pytest.mark.parametrize("group", [32, 128])
    @pytest.mark.parametrize("rounds", [0, 1, 2, 15])
    def test_greedy_and_alternating(self, bits, group, rounds):
        arrays, name = golden("quant/bcq"), f"q{bits}_g{group}_r{rounds}"
        if f"{name}/alpha" not in arrays:
            return
        found = chapter.alternating(arrays["W"], bits, group, rounds)
        same = (arrays["q3_g32_r0/B"] != 0).all(axis=(2, 3)) if group == 32 else np.ones((32, 1), bool)
        assert (~same).sum() == (group == 32)
        alpha = 1e-7 if rounds == 0 else 2e-5 if rounds <= 2 else 2e-3
        np.testing.assert_allclose(found.alpha[same], arrays[f"{name}/alpha"][same], rtol=0, atol=alpha)
        mse = np.square(found.dequantize() - arrays["W"]).mean()
        np.testing.assert_allclose(mse, arrays[f"{name}/mse"], rtol=1e-4 if rounds < 15 else 2e-3)
        if f"{name}/B" in arrays:
            np.testing.assert_array_equal(
                found.signs.reshape(arrays[f"{name}/B"].shape)[same], arrays[f"{name}/B"][same]
            )

    def test_refine_from_its_own_greedy_signs_is_equal_everywhere(self):
        arrays = golden("quant/bcq")
        signs, alpha = arrays["q3_g32_r0/B"].reshape(32, 128, 3), arrays["q3_g32_r0/alpha"].astype(float)
        found = refine(arrays["W"].astype(float), BinaryCoded(signs, alpha, np.zeros((32, 4))))
        np.testing.assert_array_equal(found.signs.reshape(32, 4, 32, 3), arrays["q3_g32_r1/B"])
        np.testing.assert_allclose(found.alpha, arrays["q3_g32_r1/alpha"], rtol=0, atol=2e-5)

    def test_its_zeros_become_plus_one(self):
        arrays = golden("quant/bcq")
        found, expected = greedy(arrays["zero_entry/in"], 2), arrays["zero_entry/B"][0, 0]
        assert (expected[0] == 0).all() and found.signs[0, 0, 0] == 1
        np.testing.assert_array_equal(found.signs[0, 1:, 0], expected[1:, 0])


@pytest.mark.exercise("chapters.quantization.lut_gemm.lut_gemm", points=3)
class TestProduct:
    @given(problems(tokens=3))
    def test_is_that_with_each_dense_weight(self, problem):
        found = lut_gemm(*problem.arrays(), problem.group_size)
        expected = problem.x.astype(float) @ problem.weight().T
        assert found.dtype == np.float64 and found.shape == expected.shape
        close = tolerance(np.float64, problem.x.shape[1], problem.largest_term())
        np.testing.assert_allclose(found, expected, **close)

    @given(problems(tokens=2), st.sampled_from([np.float16, np.float32, np.float64]))
    def test_converts_to_float64_first(self, problem, dtype):
        x, packed, alpha, offset = problem.arrays()
        held = Problem(
            x.astype(dtype), problem.signs, alpha.astype(dtype), offset if offset is None else offset.astype(dtype)
        )
        found = lut_gemm(held.x, packed, held.alpha, held.offset, problem.group_size)
        expected = held.x.astype(float) @ held.weight().T
        np.testing.assert_allclose(found, expected, **tolerance(np.float64, x.shape[1], problem.largest_term()))

    def test_groups_may_be_as_small_as_a_table(self):
        rng = np.random.default_rng(0)
        problem = Problem(rng.standard_normal((2, 64)), rng.choice([-1, 1], (3, 64, 2)), rng.random((3, 8, 2)), None)
        found = lut_gemm(*problem.arrays(), 8)
        np.testing.assert_allclose(found, problem.x @ problem.weight().T, **tolerance(float, 64, 3))

    @pytest.mark.parametrize("changed", [{"x": np.ones((1, 32))}, {"x": np.ones(64)}, {"x": np.ones((1, 1, 64))},
        {"alpha": np.ones((3, 2, 1))}, {"alpha": np.ones((5, 2, 2))}, {"alpha": np.ones((3, 1, 2))},
        {"packed": np.zeros((2, 2, 2, 4), np.int32)}, {"offset": np.ones((3, 1))}, {"offset": np.ones((1, 2))},
        {"alpha": np.ones((3, 16, 2)), "offset": None, "group_size": 4},
        {"group_size": 16}, {"group_size": 64}, {"group_size": 0}])  # fmt: skip
    def test_refuses_shapes_that_do_not_fit(self, changed):
        given_ = {"x": np.ones((1, 64)), "packed": np.zeros((2, 1, 2, 4), np.int32), "alpha": np.ones((3, 2, 2))}
        given_ |= {"offset": np.zeros((3, 2)), "group_size": 32}
        assert lut_gemm(**given_).shape == (1, 3)
        with pytest.raises(ValueError):
            lut_gemm(**(given_ | changed))


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.lut_gemm.matvec_kernel", points=3)
class TestKernel:
    @given(problems(), st.sampled_from([1, 2]), st.sampled_from([4, 8]), st.sampled_from(KERNEL_DTYPES), st.booleans())
    def test_equals_the_reference(self, problem, block_r, block_w, dtype, aligned):
        arrays = (None if part is None else torch.from_numpy(part).to(DEVICE) for part in problem.arrays())
        x, *weights = (None if part is None else poisoned(part, aligned) for part in arrays)
        x = poisoned(x.to(dtype), aligned)
        found = kernels.lut_gemm(x, *weights, problem.group_size, block_r=block_r, block_w=block_w)
        reference = oracle("quantization.lut_gemm").lut_gemm
        expected = reference(x.double().cpu().numpy(), *problem.arrays()[1:], problem.group_size)
        assert found.dtype is dtype and found.shape == expected.shape
        terms = np.abs(problem.x) @ np.abs(problem.weight()).T + np.abs(problem.x).sum() * problem.alpha.sum(-1).max()
        lost = torch.finfo(dtype).eps / 2 * np.abs(expected) + 1e-6 * terms  # only the result is rounded to dtype
        assert (np.abs(found.double().cpu().numpy() - expected) <= lost).all()

    def test_each_bit_meets_its_own_activation(self):
        signs = np.random.default_rng(0).choice([-1, 1], (5, 96, 1))
        packed = torch.from_numpy(packed_by_hand(signs)).to(DEVICE)
        alpha = torch.ones(5, 3, 1, device=DEVICE)
        for column in (0, 1, 7, 31, 32, 95):
            x = torch.eye(96, device=DEVICE)[column : column + 1].contiguous()
            found = kernels.lut_gemm(x, packed, alpha, None, 32)
            np.testing.assert_array_equal(found[0].cpu().numpy(), signs[:, column, 0])

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", ["x", "packed", "alpha", "offset"])
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        held = {"x": torch.ones(1, 96), "packed": torch.full((2, 2, 3, 4), -1, dtype=torch.int32)}
        held |= {"alpha": torch.ones(5, 3, 2), "offset": torch.full((5, 3), 0.5)}
        held = {name: part.to(DEVICE) for name, part in held.items()}
        held[which] = walled(held[which], begins)
        found = kernels.lut_gemm(**held, group_size=32, block_r=4, block_w=4)
        np.testing.assert_array_equal(found.cpu().numpy(), np.full((1, 5), 96 * 2.5))


@pytest.mark.parametrize(("columns", "value"), [(24, 1), (32, 0)])
def test_packing_refuses_half_words_and_what_is_no_sign(columns, value):
    with pytest.raises(ValueError, match=rf"signs must be −1 and \+1 .* in a multiple of 32, got shape \(2, {columns}"):
        pack(np.full((2, columns, 1), value))


@given(problems())
def test_packing_puts_every_bit_in_its_place(problem):
    packed = pack(problem.signs)
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed, packed_by_hand(problem.signs))


@given(SEEDS)
def test_the_tables_hold_every_signed_sum(seed):
    x = np.random.default_rng(seed).standard_normal((2, 24))
    tables = chapter.sign_sums(x)
    assert tables.shape == (2, 3, 256)
    for key in (0, 1, 128, 0b10100101, 255):
        signs = np.array([1 if key >> j & 1 else -1 for j in range(8)])
        np.testing.assert_allclose(tables[..., key], x.reshape(2, 3, 8) @ signs, **tolerance(float, 8, 4))
