"""GPTQ where a shortcut shows: arguments passed on, ties, extreme sizes, other shapes, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import gptq as chapter
from chapters.quantization.gptq import find_grid, gptq, inverse_factor, quantize
from tests.conftest import oracle
from tests.quantization.problems import grid_of_row, keep_only, layers

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture
def others_from_the_book(request, monkeypatch):
    """Each class grades one function: what it may call comes from the book, whether or not it is written yet."""
    keep_only(request.cls.function, chapter, monkeypatch)


@pytest.mark.exercise("chapters.quantization.gptq.find_grid", points=2)
@pytest.mark.usefixtures("others_from_the_book")
class TestFindGrid:
    function = "find_grid"

    @given(SEEDS, st.booleans())
    def test_rows_may_stand_in_groups(self, seed, symmetric):
        weight = np.random.default_rng(seed).standard_normal((2, 3, 5))
        expected = [[grid_of_row(row, 3, symmetric) for row in groups] for groups in weight]
        found = np.stack(find_grid(weight, 3, symmetric), axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-12)

    @given(SEEDS, st.booleans())
    def test_mse_searches_in_every_group(self, seed, symmetric):
        weight = np.random.default_rng(seed).standard_normal((2, 3, 5))
        alone = [find_grid(groups, 3, symmetric, mse=True) for groups in weight]
        found = find_grid(weight, 3, symmetric, mse=True)
        np.testing.assert_allclose(np.stack(found, axis=1), np.array(alone), rtol=1e-12)

    @pytest.mark.parametrize(("common", "end"), [(0.7, 0.7), (0.3, 0.3), (0.21, 0.21), (0.2, 0.21), (0.15, 0.21)])
    def test_mse_shrinks_by_no_more_than_79_percent(self, common, end):
        crowd = np.full((1, 20_000), common)  # so many that the single 1 gives way to them
        crowd[0, 7] = 1
        scale, zero = find_grid(crowd, 1, mse=True)
        np.testing.assert_allclose([scale[0], zero[0]], [end, 0], rtol=1e-12)

    @pytest.mark.parametrize("mse", [False, True])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_keeps_the_precision_and_the_weight(self, dtype, mse):
        weight = np.array([[3, 1, -2, 0.5], [0, 0, 0, 0]], dtype)
        before = weight.copy()
        scale, zero = find_grid(weight, 4, mse=mse)
        assert scale.dtype == zero.dtype == dtype
        np.testing.assert_array_equal(weight, before)


@pytest.mark.exercise("chapters.quantization.gptq.quantize", points=1)
class TestQuantize:
    @pytest.mark.parametrize("size", [300.0, 1e5, 1e12, 1e30])
    @pytest.mark.parametrize("bits", [1, 4, 8])
    def test_clips_however_far_a_weight_lies_outside(self, size, bits):
        codes = quantize(np.array([[-size, size]]), np.ones((1, 1)), np.ones((1, 1)), bits)
        np.testing.assert_array_equal(codes, [[0, 2**bits - 1]])

    @given(SEEDS)
    def test_decides_in_double_precision(self, seed):
        rng = np.random.default_rng(seed)
        steps, side = rng.integers(0, 15, 20), rng.choice([-1, 1], 20)
        codes = quantize(steps + 0.5 + 1e-12 * side, np.ones(20), np.zeros(20), 4)
        np.testing.assert_array_equal(codes, steps + (side > 0))

    @pytest.mark.parametrize(("dtype", "code"), [(np.float32, 4), (np.float64, 3)])
    def test_decides_in_the_precision_of_its_arguments(self, dtype, code):
        weight, scale, zero = (np.array([part], np.float32).astype(dtype) for part in (0.7, 0.2, 0))
        assert quantize(weight, scale, zero, 4) == code, "float32 finds 3.5, float64 a little less"

    def test_leaves_its_arguments_alone(self):
        arguments = np.array([[0.3, -2.0, 9.0]]), np.array([[0.5]]), np.array([[3.0]])
        copies = [part.copy() for part in arguments]
        quantize(*arguments, bits=3)
        for part, before in zip(arguments, copies, strict=True):
            np.testing.assert_array_equal(part, before)


@pytest.mark.exercise("chapters.quantization.gptq.inverse_factor", points=2)
class TestInverseFactor:
    @given(layers(), st.sampled_from([0.01, 1.0]), st.sampled_from([2.0**-66, 2.0**40]))
    def test_the_size_of_the_hessian_only_scales_the_factor(self, layer, damping, factor):
        plain, scaled = inverse_factor(layer.hessian, damping), inverse_factor(layer.hessian * factor, damping)
        np.testing.assert_allclose(scaled * factor**0.5, plain, rtol=1e-9, atol=1e-9 * np.abs(plain).max())

    @pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
    def test_refuses_too_few_tokens_at_any_size(self, factor):
        x = np.random.default_rng(1).standard_normal((20, 64))
        with pytest.raises(ValueError):
            inverse_factor(factor * x.T @ x, 0.0)

    @pytest.mark.parametrize("factor", [2.0**-20, 1.0, 2.0**20])
    def test_what_is_below_a_billionth_of_a_thousandth_is_rounding(self, factor):
        v = np.array([999999.0, 1411, 89, 34])  # v · v is 10^12 − 1: of the last diagonal element 1 is left, exactly
        h = factor * np.block([[2.0**40 * np.eye(4), 2.0**20 * v[:, None]], [2.0**20 * v, np.array(1e12)]])
        assert np.isfinite(inverse_factor(h, 0.0)).all()
        h[4, 4] -= factor / 4
        with pytest.raises(ValueError):
            inverse_factor(h, 0.0)


GOOD = {"weight": np.eye(4), "hessian": np.eye(4), "bits": 4}


@pytest.mark.exercise("chapters.quantization.gptq.gptq", points=4)
@pytest.mark.usefixtures("others_from_the_book")
class TestGptq:
    function = "gptq"

    @given(layers(columns=(12, 24)), st.sampled_from([None, 2, 6]), st.booleans(), st.booleans(), st.booleans())
    def test_fits_every_grid_as_asked(self, layer, size, symmetric, act_order, static):
        static = static and size is not None
        identity = np.eye(layer.weight.shape[1])  # columns do not interact, so that it is rounding to nearest
        found = gptq(layer.weight, identity, 3, size, symmetric, True, act_order, static)
        expected = oracle("quantization.gptq").round_to_nearest(layer.weight, 3, size, symmetric, mse=True)
        np.testing.assert_array_equal(found.scale, expected.scale)
        np.testing.assert_array_equal(found.zero, expected.zero)
        np.testing.assert_array_equal(found.codes, expected.codes)

    @given(SEEDS, st.sampled_from([1, 2, 3]))
    def test_act_order_takes_equal_columns_in_their_order(self, seed, different):
        diagonal = np.random.default_rng(seed).integers(1, 1 + different, 96).astype(float)
        order = sorted(range(96), key=lambda j: -diagonal[j])
        found = gptq(np.ones((1, 96)), np.diag(diagonal), 4, 2, act_order=True)
        np.testing.assert_array_equal(found.group_of_column[order], np.arange(96) // 2)

    @pytest.mark.parametrize(
        ("diagonal", "groups"), [((0, 4, 0.25, 0.5), [0, 0, 1, 1]), ((0.5, 4, 0, 2), [1, 0, 1, 0])]
    )
    def test_a_dead_column_is_ordered_as_a_one(self, diagonal, groups):
        found = gptq(np.ones((1, 4)), np.diag(diagonal), 4, 2, act_order=True)
        np.testing.assert_array_equal(found.group_of_column, groups)

    @pytest.mark.parametrize("least", [1e-9, 1e-30, 1e-300])
    def test_a_column_with_the_least_input_is_not_dead(self, least):
        found = gptq(np.array([[3.0, 1.0, 2.0]]), np.diag([least, 1.0, 2.0]), 4)
        assert found.dequantize()[0, 0] == pytest.approx(3)

    def test_blocks_are_of_128_columns_unless_told(self):
        rng = np.random.default_rng(3)
        weight, x = rng.standard_normal((3, 192)), rng.standard_normal((300, 192))
        blocks = {}, {"block_size": 128}, {"block_size": 9}
        found, told, other = (gptq(weight, x.T @ x, 3, 64, **block).scale for block in blocks)
        np.testing.assert_array_equal(found, told)
        assert (found[:, 1:] != other[:, 1:]).all(), "grids tell which errors had come when they were fitted"

    @pytest.mark.parametrize(("bits", "size", "groups"), [(2, None, 1), (3, 3, 2), (8, 6, 1)])
    def test_the_result_is_complete(self, bits, size, groups):
        weight = np.arange(12, dtype=np.float32).reshape(2, 6) - 5
        found = gptq(weight, np.eye(6), bits, size)
        assert found.bits == bits and found.codes.dtype == np.uint8 and found.codes.shape == (2, 6)
        assert found.scale.dtype == np.float64 and found.scale.shape == found.zero.shape == (2, groups)
        np.testing.assert_array_equal(found.group_of_column, np.arange(6) // (size or 6))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"bits": 0},
            {"bits": 9},
            {"bits": 2.5},
            {"group_size": 0},
            {"group_size": 3},
            {"group_size": -2},
            {"weight": np.full((2, 4), np.nan)},
            {"weight": np.full((2, 4), -np.inf)},
            {"weight": np.ones(4)},
            {"weight": np.ones((0, 4))},
            {"hessian": np.eye(3)},
            {"hessian": np.eye(5)},
            {"hessian": np.full((4, 4), np.inf)},
            {"hessian": np.eye(4) + np.eye(4, k=1)},
            {"hessian": -np.eye(4)},
            {"damping": -0.1},
            {"damping": np.nan},
            {"damping": np.inf},
            {"block_size": 0},
        ],
    )
    def test_refuses_what_its_docstring_excludes(self, wrong):
        with pytest.raises(ValueError):
            gptq(**(GOOD | wrong))
