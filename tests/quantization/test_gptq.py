"""GPTQ against its definition and the arrays of its authors' code."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import gptq as chapter
from chapters.quantization.gptq import find_grid, gptq, inverse_factor, obq, quantize
from tests.conftest import DEVICE, golden, kernel
from tests.quantization.problems import (
    column_by_column,
    grid_between,
    grid_of_row,
    keep_only,
    layers,
    nearest,
    range_of_row,
)

kernel_file = kernel("quantization.gptq")
VARIANTS = sorted({key.split("/")[0] for key in golden("quant/gptq") if "/" in key})
BITS = st.sampled_from([1, 2, 3, 4, 8])


@pytest.fixture
def others_from_the_book(request, monkeypatch):
    """Each class grades one function: what it may call comes from the book, whether or not it is written yet."""
    keep_only(request.cls.function, chapter, monkeypatch)


def codes_by_hand(weight: np.ndarray, bits: int, symmetric: bool = False) -> np.ndarray:
    """Round to nearest, every row on its own grid."""
    grids = [grid_of_row(row, bits, symmetric) for row in weight]
    return np.array([[nearest(w, *grid, bits) for w in row] for row, grid in zip(weight, grids, strict=True)])


def options_of(variant: str) -> dict:
    """The arguments of `gptq` that a name such as "b3_sym_g64_actorder" stands for."""
    group, block = re.search(r"_g(\d+)", variant), re.search(r"_blk(\d+)", variant)
    return {
        "bits": int(variant[1]),
        "group_size": int(group[1]) if group else None,
        "symmetric": "_sym" in variant,
        "mse": "_mse" in variant,
        "act_order": "_actorder" in variant,
        "static_groups": "_static" in variant,
        "block_size": int(block[1]) if block else 128,
    }


@pytest.mark.exercise("chapters.quantization.gptq.find_grid", points=2)
@pytest.mark.usefixtures("others_from_the_book")
class TestFindGrid:
    function = "find_grid"

    @given(layers(), BITS, st.booleans())
    def test_follows_its_definition_row_by_row(self, layer, bits, symmetric):
        scale, zero = find_grid(layer.weight, bits, symmetric)
        expected = [grid_of_row(row, bits, symmetric) for row in layer.weight]
        np.testing.assert_allclose(np.stack([scale, zero], axis=1), expected, rtol=1e-12)

    @given(layers(), st.sampled_from([2, 4]), st.booleans())
    def test_mse_takes_the_best_of_eighty_shrunken_ranges(self, layer, bits, symmetric):
        scale, zero = find_grid(layer.weight, bits, symmetric, mse=True)
        for row, found in zip(layer.weight, zip(scale, zero, strict=True), strict=True):
            low, high = range_of_row(row, symmetric)
            shrunken = [(low * (1 - i / 100), high * (1 - i / 100)) for i in range(80)]
            trials = [grid_between(*ends, bits, symmetric) for ends in shrunken]
            errors = [sum(abs(s * (nearest(w, s, z, bits) - z) - w) ** 2.4 for w in row) for s, z in trials]
            taken = [error for trial, error in zip(trials, errors, strict=True) if np.allclose(trial, found, 1e-12, 0)]
            assert taken and min(taken) <= min(errors) * (1 + 1e-6) + (1e-12 * (high - low)) ** 2.4

    def test_mse_keeps_the_first_of_equals(self):
        np.testing.assert_allclose(find_grid(np.zeros((1, 3)), 2, mse=True)[0], 2 / 3)

    @pytest.mark.parametrize("variant", ["b4_sym", "b4_asym_mse", "b2_asym"])
    def test_equals_the_released_code_in_its_own_precision(self, variant):
        arrays, chosen = golden("quant/gptq"), options_of(variant)
        scale, zero = find_grid(arrays["W"].astype(np.float32), chosen["bits"], chosen["symmetric"], chosen["mse"])
        np.testing.assert_allclose(scale, arrays[f"{variant}/scale"][:, 0], rtol=1e-6)
        np.testing.assert_array_equal(zero, arrays[f"{variant}/zero"][:, 0])

    @pytest.mark.parametrize("row", [[5e-324, 0.0], [-1.5e308, 1.5e308]])
    def test_refuses_a_range_that_cannot_be_divided(self, row):
        with np.errstate(over="ignore"), pytest.raises(ValueError):
            find_grid(np.array([row]), 4)


@pytest.mark.exercise("chapters.quantization.gptq.quantize", points=1)
class TestQuantize:
    @given(st.integers(0, 2**32 - 1), BITS, st.sampled_from([2.0**-9, 1.0, 2.0**90]))
    def test_takes_the_nearest_code_and_halves_to_the_even_one(self, seed, bits, scale):
        rng = np.random.default_rng(seed)
        zero = rng.integers(0, 2**bits, 40)
        weight = scale * rng.integers(-(2 ** (bits + 1)), 2 ** (bits + 1), 40) / 2  # half of them between two codes
        expected = [nearest(w, scale, int(z), bits) for w, z in zip(weight, zero, strict=True)]
        codes = quantize(weight, np.full(40, scale), zero.astype(float), bits)
        assert codes.dtype == np.uint8
        np.testing.assert_array_equal(codes, expected)

    @given(layers(), BITS)
    def test_values_on_the_grid_keep_their_codes(self, layer, bits):
        scale, zero = np.array([grid_of_row(row, bits, False) for row in layer.weight]).T[..., None]  # [out, 1]
        codes = np.broadcast_to(np.arange(2**bits), (len(scale), 2**bits))
        np.testing.assert_array_equal(quantize(scale * (codes - zero), scale, zero, bits), codes)

    def test_rounding_to_nearest_equals_the_released_code_in_its_own_precision(self):
        arrays = golden("quant/gptq")
        weight = arrays["W"].astype(np.float32)
        scale, zero = arrays["b4_sym/scale"][:, :1], arrays["b4_sym/zero"][:, :1]
        rounded = scale * (quantize(weight, scale, zero, 4) - zero)
        np.testing.assert_allclose(rounded, arrays["b4_sym/rtn_Q"], rtol=1e-6)


@pytest.mark.exercise("chapters.quantization.gptq.inverse_factor", points=2)
class TestInverseFactor:
    @given(layers(), st.sampled_from([0.01, 0.1, 1.0]))
    def test_is_the_upper_factor_of_the_damped_inverse(self, layer, damping):
        h = layer.hessian
        upper = inverse_factor(h, damping)
        damped = h + np.diag(np.full(len(h), damping * np.trace(h) / len(h)))
        assert np.array_equal(upper, np.triu(upper)) and (np.diag(upper) > 0).all()
        np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(len(h)), atol=1e-8)

    def test_leaves_the_hessian_alone(self):
        h = np.diag([1.0, 3.0])
        inverse_factor(h, 0.5)
        np.testing.assert_array_equal(h, np.diag([1.0, 3.0]))

    @pytest.mark.parametrize(
        "bad", [np.diag([1.0, -2.0]), np.ones((3, 3)), np.array([[1.0, 2.0], [2.0, 1.0]]), np.zeros((2, 2))]
    )
    def test_refuses_what_is_not_positive_definite(self, bad):
        with pytest.raises(ValueError):
            inverse_factor(bad, 0.0)

    def test_refuses_fewer_tokens_than_columns_without_damping(self):
        x = np.random.default_rng(0).standard_normal((20, 64))
        with pytest.raises(ValueError):
            inverse_factor(x.T @ x, 0.0)
        assert np.isfinite(inverse_factor(x.T @ x, 0.01)).all()


@pytest.mark.exercise("chapters.quantization.gptq.gptq", points=4)
@pytest.mark.usefixtures("others_from_the_book")
class TestGptq:
    function = "gptq"

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_equals_the_released_code(self, variant):
        arrays = golden("quant/gptq")
        found = gptq(arrays["W"], arrays["H"], **options_of(variant))
        group = arrays[f"{variant}/group_of_col"]
        np.testing.assert_array_equal(found.codes, arrays[f"{variant}/codes"])
        np.testing.assert_array_equal(found.zero[:, found.group_of_column], arrays[f"{variant}/zero"][:, group])
        np.testing.assert_allclose(
            found.scale[:, found.group_of_column], arrays[f"{variant}/scale"][:, group], rtol=1e-6
        )
        outputs = arrays["X"].astype(float) @ (arrays["W"] - found.dequantize()).T
        assert np.sum(outputs**2) == pytest.approx(float(arrays[f"{variant}/out_loss"]), rel=1e-5)

    @given(
        layers(), BITS, st.sampled_from([None, 1, 2, 3]), st.booleans(), st.booleans(), st.booleans(),
        st.sampled_from([0.01, 0.3, 1.0]), st.sampled_from([1, 5, 8, 128]),
    )  # fmt: skip
    def test_equals_elimination_column_by_column(
        self, layer, bits, parts, symmetric, act_order, static, damping, block
    ):
        columns = layer.weight.shape[1]
        size = columns // parts if parts and columns % parts == 0 else None
        static = static and size is not None
        found = gptq(
            layer.weight, layer.hessian, bits, size, symmetric, act_order=act_order, static_groups=static,
            damping=damping, block_size=block,
        )  # fmt: skip
        expected = column_by_column(layer, bits, size, symmetric, act_order, static, damping, block)
        np.testing.assert_array_equal(found.codes, expected)

    @given(layers(), BITS, st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
    def test_is_rounding_to_nearest_where_columns_do_not_interact(self, layer, bits, symmetric, act_order, seed):
        diagonal = np.diag(np.random.default_rng(seed).uniform(0.1, 10, layer.weight.shape[1]))
        found = gptq(layer.weight, diagonal, bits, symmetric=symmetric, act_order=act_order)
        np.testing.assert_array_equal(found.codes, codes_by_hand(layer.weight, bits, symmetric))

    @given(layers(), BITS, st.integers(1, 30), st.booleans())
    def test_blocks_change_nothing_per_row(self, layer, bits, block, act_order):
        whole, parts = (
            gptq(layer.weight, layer.hessian, bits, act_order=act_order, block_size=b) for b in (999, block)
        )
        np.testing.assert_array_equal(parts.codes, whole.codes)

    @given(layers(dead=False), BITS, st.sampled_from([2.0**-66, 1e-6, 3.7, 1e9]))
    def test_the_size_of_the_hessian_does_not_matter(self, layer, bits, factor):
        plain, scaled = (gptq(layer.weight, layer.hessian * f, bits) for f in (1.0, factor))
        np.testing.assert_array_equal(scaled.codes, plain.codes)

    @given(layers(dead=False), BITS, st.integers(0, 2**32 - 1))
    def test_act_order_does_not_care_how_columns_were_ordered(self, layer, bits, seed):
        shuffle = np.random.default_rng(seed).permutation(layer.weight.shape[1])
        straight = gptq(layer.weight, layer.hessian, bits, act_order=True)
        h = layer.hessian[np.ix_(shuffle, shuffle)]
        shuffled = gptq(layer.weight[:, shuffle], h, bits, act_order=True)
        np.testing.assert_array_equal(shuffled.codes, straight.codes[:, shuffle])

    @given(layers(dead=False), BITS, st.sampled_from([None, 1, 2]))
    def test_act_order_leaves_equal_columns_in_their_order(self, layer, bits, parts):
        columns = layer.weight.shape[1]
        size = columns // parts if parts and columns % parts == 0 else None
        spread = np.sqrt(np.diag(layer.hessian))
        h = layer.hessian / np.outer(spread, spread)
        np.fill_diagonal(h, 1)
        ordered, straight = (gptq(layer.weight, h, bits, size, act_order=order) for order in (True, False))
        np.testing.assert_array_equal(ordered.codes, straight.codes)
        np.testing.assert_array_equal(ordered.group_of_column, straight.group_of_column)

    def test_dead_columns_become_zero_but_rows_of_grids_still_see_them(self):
        weight, h = np.array([[9.0, 1.0, -1.0]]), np.diag([0.0, 1.0, 1.0])
        found = gptq(weight, h, 4)
        assert found.dequantize()[0, 0] == 0
        np.testing.assert_allclose(found.scale, 10 / 15)
        np.testing.assert_allclose(gptq(weight, h, 4, group_size=3).scale, 2 / 15)

    def test_leaves_its_arguments_alone(self):
        weight, h = np.array([[3.0, 1.0, -1.0]]), np.diag([0.0, 1.0, 2.0])
        copies = weight.copy(), h.copy()
        gptq(weight, h, 4, act_order=True)
        np.testing.assert_array_equal(weight, copies[0])
        np.testing.assert_array_equal(h, copies[1])


@pytest.mark.exercise("chapters.quantization.gptq.obq", points=3)
@pytest.mark.usefixtures("others_from_the_book")
class TestObq:  # more in test_gptq_obq.py
    function = "obq"

    @pytest.mark.parametrize(("variant", "damping"), [("q4_asym", 0.0), ("q2_asym", 0.01)])
    def test_equals_the_released_code(self, variant, damping):
        arrays = golden("quant/obq")
        found = obq(arrays["W"], arrays["H"], int(variant[1]), damping=damping)
        np.testing.assert_array_equal(found.codes, arrays[f"{variant}/codes"])
        np.testing.assert_array_equal(found.zero, arrays[f"{variant}/zero"])
        np.testing.assert_allclose(found.scale, arrays[f"{variant}/scale"], rtol=1e-6)
        outputs = arrays["X"].astype(float) @ (arrays["W"] - found.dequantize()).T
        assert np.sum(outputs**2) == pytest.approx(float(arrays[f"{variant}/out_loss"]), rel=1e-5)


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.gptq.solve_kernel", points=4)
class TestSolveKernel:  # more in test_gptq_kernel.py
    @pytest.mark.parametrize("variant", ["b2_asym", "b4_asym_mse", "b4_asym_blk32", "b3_sym_g64_actorder"])
    def test_equals_the_released_code(self, variant):
        arrays = golden("quant/gptq")
        weight, hessian = torch.from_numpy(arrays["W"][:8]).to(DEVICE), torch.from_numpy(arrays["H"]).to(DEVICE)
        solved = kernel_file.gptq(weight.float(), hessian, **options_of(variant))
        codes, scale, zero, group = (part.cpu().numpy() for part in solved)
        released = arrays[f"{variant}/group_of_col"]
        np.testing.assert_array_equal(codes, arrays[f"{variant}/codes"][:8])
        np.testing.assert_array_equal(zero[:, group], arrays[f"{variant}/zero"][:8, released])
        np.testing.assert_allclose(scale[:, group], arrays[f"{variant}/scale"][:8, released], rtol=1e-6)


@pytest.mark.slow
def test_a_thousand_columns_take_seconds():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2048, 1024))
    start = time.perf_counter()
    gptq(rng.standard_normal((1024, 1024)), x.T @ x, 4, group_size=128, act_order=True)
    assert time.perf_counter() - start < 5


def test_refusals_say_what_is_wrong():
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="weight has a range that float64 cannot divide"):
        find_grid(np.array([[5e-324, 0.0]]), 4)
    with pytest.raises(ValueError, match=r"hessian is not positive definite with damping=0.0; .* use more text"):
        inverse_factor(np.ones((3, 3)), 0.0)
