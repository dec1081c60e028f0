"""LLM.int8: codes against a loop and the library's arrays, the product against its definition, kernels against both."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import llm_int8 as chapter
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, tolerance
from tests.fences import walled
from tests.quantization.int8_products import Product, by_hand, inputs, on_device, products, statistics_by_the_book

llm_int8 = kernel("quantization.llm_int8")


@pytest.mark.exercise("chapters.quantization.llm_int8.quantize_rows", points=3)
class TestQuantizeRows:
    @given(inputs(), st.sampled_from([0.0, 1.0, 6.0, 1e9]))
    def test_follows_the_definition_number_by_number(self, x, threshold):
        codes, absmax, outliers = chapter.quantize_rows(x, threshold)
        expected = by_hand(x, threshold)
        assert codes.dtype == np.int8 and absmax.dtype == np.float32 and outliers.dtype == np.int64
        for found, right in zip((codes, absmax, outliers), expected, strict=True):
            np.testing.assert_array_equal(found, right)

    @pytest.mark.parametrize("threshold", ["0.0", "3.0"])
    def test_gives_the_librarys_codes_for_activations(self, threshold):
        held = golden("quant/llm_int8")
        codes, absmax, outliers = chapter.quantize_rows(held["X"], float(threshold))
        np.testing.assert_array_equal(codes, held[f"t{threshold}/X_int8"])
        np.testing.assert_array_equal(absmax, held[f"t{threshold}/X_absmax"])
        np.testing.assert_array_equal(outliers, held[f"t{threshold}/outlier_cols"])

    def test_gives_the_librarys_codes_for_weights(self):
        held = golden("quant/llm_int8")
        codes, absmax, outliers = chapter.quantize_rows(held["W"])
        np.testing.assert_array_equal(codes, held["W_int8"])
        np.testing.assert_array_equal(absmax, held["W_absmax"])
        assert outliers.size == 0

    def test_halves_go_to_the_even_code(self):
        x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float32)
        np.testing.assert_array_equal(chapter.quantize_rows(x)[0], [[127, 0, 2, 2, 0, -2, -2]])

    def test_maxima_are_over_what_is_no_outlier_in_any_column(self):
        x = np.array([[1.0, 60.0], [1.0, 4.0], [2.0, -6.0]])
        codes, absmax, outliers = chapter.quantize_rows(x, 6.0)
        np.testing.assert_array_equal(absmax, [1, 4, 2])
        np.testing.assert_array_equal(codes, [[127, 0], [32, 0], [127, 0]])
        np.testing.assert_array_equal(outliers, [1])

    def test_a_row_of_nothing_but_outliers_or_zeros_has_no_scale(self):
        x = np.array([[7.0, 8.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        codes, absmax, _ = chapter.quantize_rows(x, 6.0)
        np.testing.assert_array_equal(absmax, [0, 1, 0])
        np.testing.assert_array_equal(codes, 0)

    def test_maxima_whose_reciprocal_is_too_large_count_as_zero(self):
        x = np.array([[2.0**-119, -(2.0**-121)], [2.0**-120, 0], [1e-44, 0]], np.float32)
        codes, absmax, _ = chapter.quantize_rows(x)
        np.testing.assert_array_equal(codes, [[127, -32], [0, 0], [0, 0]])
        np.testing.assert_array_equal(absmax, np.array([2.0**-119, 0, 0], np.float32))

    @pytest.mark.parametrize("threshold", [0.0, 6.0])
    @pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf, 1e300])
    def test_what_is_not_finite_in_float32_is_an_outlier(self, spoiled, threshold):
        codes, absmax, outliers = chapter.quantize_rows(np.array([[1.0, 2.0], [spoiled, 4.0]]), threshold)
        np.testing.assert_array_equal(codes, [[0, 127], [0, 127]])
        np.testing.assert_array_equal(absmax, [2, 4])
        np.testing.assert_array_equal(outliers, [0])

    @given(inputs(rows=(2, 5)))
    def test_company_decides_about_columns_but_not_about_scales(self, x):
        codes, absmax, outliers = chapter.quantize_rows(x, 6.0)
        for i, row in enumerate(x):
            alone, own, _ = chapter.quantize_rows(row[None], 6.0)
            alone[:, outliers] = 0
            np.testing.assert_array_equal(codes[i : i + 1], alone)
            np.testing.assert_array_equal(absmax[i], own[0])

    def test_compares_in_float32(self):
        x = np.array([[6 - 1e-9, 3.0], [1.0, 2.0]])  # the first is 6 in float32
        codes, absmax, outliers = chapter.quantize_rows(x, np.float64(6))
        assert codes.tolist() == [[0, 127], [0, 127]] and absmax.tolist() == [3, 2] and outliers.tolist() == [0]
        x = np.array([[0.7, 0.1]], np.float32)  # less than the 0.7 of float64
        assert chapter.quantize_rows(x, np.float64(0.7))[2].tolist() == [0]

    def test_leaves_its_input_alone(self):
        x = np.array([[1.0, 60.0], [0.0, 0.0]], np.float32)
        chapter.quantize_rows(x, 6.0)
        np.testing.assert_array_equal(x, [[1, 60], [0, 0]])

    @pytest.mark.parametrize(
        ("shape", "threshold"), [((3,), 6), ((0, 3), 6), ((3, 0), 6), ((2, 2), -1), ((2, 2), math.nan)]
    )
    def test_refuses_what_makes_no_sense(self, shape, threshold):
        with pytest.raises(ValueError):
            chapter.quantize_rows(np.ones(shape), threshold)


@pytest.mark.exercise("chapters.quantization.llm_int8.llm_int8_matmul", points=2)
class TestProduct:
    @pytest.fixture(autouse=True)
    def _only_the_product_is_graded(self, monkeypatch):
        monkeypatch.setattr(chapter, "quantize_rows", oracle("quantization.llm_int8").quantize_rows)

    @given(products())
    def test_follows_the_definition_number_by_number(self, product):
        x, codes, absmax, threshold, exact = product.arguments()
        x_codes, maxima, outliers = by_hand(x, threshold)
        expected = np.zeros((len(x), len(codes)))
        for i, n, k in np.ndindex(*expected.shape, x.shape[1]):
            value = float(exact[n, k]) if exact is not None else int(codes[n, k]) * float(absmax[n]) / 127
            if k in outliers:
                expected[i, n] += float(x[i, k]) * value
            else:
                expected[i, n] += x_codes[i][k] * int(codes[n, k]) * float(maxima[i]) * float(absmax[n]) / 127**2
        before = [np.array(part) for part in product.arguments()]
        found = chapter.llm_int8_matmul(*product.arguments())
        assert found.dtype == np.float64
        assert all((part == held).all() for part, held in zip(product.arguments(), before, strict=True))
        np.testing.assert_allclose(found, expected, **product.close(np.float64))

    @pytest.mark.parametrize("threshold", ["0.0", "3.0"])
    def test_gives_the_librarys_results(self, threshold):
        held = golden("quant/llm_int8")
        found = held["bias"] + chapter.llm_int8_matmul(held["X"], held["W_int8"], held["W_absmax"], float(threshold))
        np.testing.assert_allclose(found, held[f"t{threshold}/y_fp32"], atol=1e-3)  # 26 at the most, in float32
        np.testing.assert_allclose(found, held[f"t{threshold}/y_fp16"], atol=2e-2)

    def test_serves_a_layer_of_the_library_at_its_usual_threshold(self):
        held = golden("quant/llm_int8")
        found = held["bias"] + chapter.llm_int8_matmul(held["X"], held["W_int8"], held["W_absmax"])
        np.testing.assert_allclose(found, held["linear8bitlt_t6_fp16"], atol=2e-2)

    def test_the_papers_variant_comes_nearer_than_the_librarys(self):
        held = golden("quant/llm_int8")
        errors = [
            np.linalg.norm(
                held["bias"] + chapter.llm_int8_matmul(held["X"], held["W_int8"], held["W_absmax"], *how) - y
            )
            for y in (held["y_exact_fp64"],)
            for how in ((0.0,), (6.0,), (6.0, held["W"]))
        ]
        assert errors[2] < errors[1] / 2 < errors[0] / 4

    def test_where_all_is_outliers_nothing_of_x_is_rounded(self):
        held = golden("quant/llm_int8")
        found = chapter.llm_int8_matmul(held["X"], held["W_int8"], held["W_absmax"], 1e-9, held["W"])
        expected = held["X"].astype(float) @ held["W"].astype(float).T
        np.testing.assert_allclose(found, expected, **tolerance(np.float64, 128, 100))

    def test_a_token_is_computed_differently_in_other_company(self):
        x = np.array([[1.0, 0.3003], [0.5, 60.0]])  # alone, 0.3003 is rounded to 38 / 127
        codes, absmax = np.array([[127, 127]], np.int8), np.ones(1, np.float32)
        alone, together = (chapter.llm_int8_matmul(part, codes, absmax)[0, 0] for part in (x[:1], x))
        assert alone == pytest.approx(1 + 38 / 127) and together == pytest.approx(1.3003)

    @pytest.mark.parametrize("value", [5.99, 6.0, 6.5])
    def test_takes_six_as_its_threshold_unless_told(self, value):
        x, codes, absmax = np.array([[0.3003, value]]), np.array([[127, 127]], np.int8), np.ones(1, np.float32)
        found, told = chapter.llm_int8_matmul(x, codes, absmax), chapter.llm_int8_matmul(x, codes, absmax, 6.0)
        first = np.rint(127 * 0.3003 / value) / 127 * value if value < 6 else 0.3003
        assert found == told == pytest.approx(value + first, rel=1e-3)

    def test_sums_integers_that_eight_bits_do_not_hold(self):
        found = chapter.llm_int8_matmul(np.ones((2, 300)), np.full((1, 300), 127, np.int8), np.ones(1, np.float32))
        np.testing.assert_allclose(found, 300, rtol=1e-12)

    @pytest.mark.parametrize("exact", [None, np.ones((2, 3))])
    def test_nan_reaches_its_own_row_only(self, exact):
        x = np.array([[1.0, math.nan, 1.0], [1.0, 2.0, 3.0]])
        found = chapter.llm_int8_matmul(x, np.full((2, 3), 127, np.int8), np.ones(2, np.float32), 0.0, exact)
        assert np.isnan(found[0]).all()
        np.testing.assert_allclose(found[1], 6, atol=0.02)

    @pytest.mark.parametrize(
        ("x", "codes", "absmax", "exact"),
        [
            ((2, 3), (4, 2), (4,), None),
            ((3,), (4, 3), (4,), None),
            ((2, 3), (3,), (3,), None),
            ((3, 3), (3,), (3,), None),
            ((2, 3), (4, 3), (1,), None),
            ((2, 3), (4, 3), (3,), None),
            ((2, 3), (4, 3), (4, 1), None),
            ((2, 3), (4, 3), (4,), (3, 4)),
            ((2, 3), (4, 3), (4,), (1, 3)),
        ],
    )
    def test_refuses_shapes_that_do_not_fit(self, x, codes, absmax, exact):
        with pytest.raises(ValueError):
            chapter.llm_int8_matmul(
                np.ones(x), np.ones(codes, np.int8), np.ones(absmax), 6.0, None if exact is None else np.ones(exact)
            )


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.llm_int8.statistics_kernel", points=2)
class TestStatisticsKernel:
    @given(
        inputs(columns=(1, 7, 64, 67, 130)), st.sampled_from([0.0, 2.0, 6.0]), st.sampled_from([16, 64]),
        st.sampled_from([16, 4096]), st.sampled_from(KERNEL_DTYPES), st.booleans(),
    )  # fmt: skip
    def test_equals_the_reference(self, x, threshold, block_k, block, dtype, aligned):
        found = llm_int8.outlier_statistics(on_device(x, dtype, aligned), threshold, block_k, block)
        _, absmax, outliers = oracle("quantization.llm_int8").quantize_rows(x, threshold)
        columns, tiles = np.zeros(x.shape[1], np.int8), np.zeros(-(-x.shape[1] // block_k), np.int8)
        columns[outliers] = tiles[outliers // block_k] = 1
        for part, expected in zip(found, (absmax, columns, tiles), strict=True):
            np.testing.assert_array_equal(part.cpu().numpy(), expected)

    @pytest.mark.parametrize("threshold", [0.0, 6.0])
    @pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_an_outlier(self, spoiled, threshold):
        x = np.array([[1, 2, -5, 0, 3], [0, 1, 0, spoiled, 0]], np.float32)
        maxima, columns, tiles = llm_int8.outlier_statistics(on_device(x), threshold, 2, 4)
        assert maxima.tolist() == [5, 1] and columns.tolist() == [0, 0, 0, 1, 0] and tiles.tolist() == [0, 1, 0]

    def test_maxima_whose_reciprocal_is_too_large_count_as_zero(self):
        x = np.array([[2.0**-119, 0], [2.0**-120, 0]], np.float32)
        assert llm_int8.outlier_statistics(on_device(x))[0].tolist() == [2.0**-119, 0]

    @pytest.mark.parametrize("begins", [False, True])
    def test_loads_nothing_outside_of_its_input(self, begins):
        x = walled(torch.full((3, 37), 2.0, dtype=torch.float16, device=DEVICE), begins)
        maxima, columns, _ = llm_int8.outlier_statistics(x, 6.0, 16, 16)
        assert maxima.tolist() == [2, 2, 2] and not columns.any()


def multiplied(product: Product, dtype: torch.dtype, block_k: int, aligned: bool = True, **sizes: int) -> torch.Tensor:
    """The product by the kernel that is graded, the rest by the book; sizes: block_m, block_n."""
    x, codes, absmax, threshold, exact = product.arguments()
    held = on_device(x, dtype, aligned), statistics_by_the_book(x, threshold, block_k), on_device(codes, None, aligned)
    weight = None if exact is None else on_device(exact, dtype, aligned)
    blocks = {"block_k": block_k, "warps": 4, "stages": 2} | sizes
    return llm_int8.multiply(*held, on_device(absmax, None, aligned), weight, blocks)


@pytest.mark.kernel
@pytest.mark.exercise("kernels.quantization.llm_int8.matmul_kernel", points=4)
class TestMatmulKernel:
    @given(
        products(rows=(1, 17, 33), columns=(1, 31, 64, 100), wide=(1, 16, 19)), st.sampled_from([16, 32]),
        st.sampled_from([16, 32]), st.sampled_from([32, 64]), st.sampled_from(KERNEL_DTYPES), st.booleans(),
    )  # fmt: skip
    def test_equals_the_reference(self, product, block_m, block_n, block_k, dtype, aligned):
        found = multiplied(product, dtype, block_k, aligned, block_m=block_m, block_n=block_n)
        expected = oracle("quantization.llm_int8").llm_int8_matmul(*product.arguments())
        assert found.dtype is dtype and found.shape == expected.shape
        np.testing.assert_allclose(found.double().cpu().numpy(), expected, **product.close(dtype))

    @given(inputs(rows=(2, 19), columns=(31, 64)), st.sampled_from([0.0, 6.0]), st.sampled_from(KERNEL_DTYPES))
    def test_its_codes_are_those_of_the_reference(self, x, threshold, dtype):
        codes, absmax, _ = oracle("quantization.llm_int8").quantize_rows(x, threshold)
        eye, ones = np.eye(x.shape[1], dtype=np.int8), np.full(x.shape[1], 127, np.float32)
        product = Product(x, 127 * eye, ones, threshold, np.zeros(eye.shape, np.float16))
        found = multiplied(product, dtype, 32, block_m=32, block_n=64).double().cpu().numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.where(absmax[:, None] > 0, found / absmax[:, None].astype(float), 0)  # code per maximum
        assert (np.abs(found - codes) < 0.1).all(), "float16 has 11 bits, a code 7"

    def test_sums_the_librarys_integers(self):
        held = golden("quant/llm_int8")
        product = Product(held["X"], held["W_int8"], np.ones(48, np.float32), 0.0, None)
        found = multiplied(product, torch.float32, 64, block_m=32, block_n=64).double().cpu().numpy()
        np.testing.assert_array_equal(np.rint(found * 127**2 / held["t0.0/X_absmax"][:, None]), held["t0.0/acc_int32"])

    @pytest.mark.parametrize("exact", [False, True])
    def test_outliers_are_not_rounded(self, exact):
        x = np.random.default_rng(0).integers(600, 900, (3, 64)).astype(np.float16)
        weight = np.random.default_rng(1).integers(-127, 128, (5, 64)).astype(np.float16)
        weight[:, 0] = 127
        product = Product(x, weight.astype(np.int8), np.full(5, 127, np.float32), 6.0, weight if exact else None)
        found = multiplied(product, torch.float32, 32, block_m=16, block_n=16)
        np.testing.assert_allclose(found.cpu().numpy(), x.astype(float) @ weight.astype(float).T, rtol=1e-6)

    def test_only_rows_with_nan_become_nan(self):
        x = np.array([[1.0, math.nan] * 16, [2.0, 2.0] * 16], np.float32)
        product = Product(x, np.full((3, 32), 127, np.int8), np.ones(3, np.float32), 6.0, None)
        found = multiplied(product, torch.float32, 32, block_m=16, block_n=16).cpu()
        assert found[0].isnan().all() and found[1].tolist() == [64, 64, 64]

    def test_sums_integers_that_sixteen_bits_do_not_hold(self):
        product = Product(
            np.ones((2, 96), np.float16), np.full((1, 96), 127, np.int8), np.ones(1, np.float32), 6.0, None
        )
        np.testing.assert_allclose(multiplied(product, torch.float32, 32, block_m=16, block_n=16).cpu(), 96, rtol=1e-6)

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", ["x", "codes", "absmax", "exact", "maxima", "columns", "tiles"])
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        x = np.where(np.arange(37) == 33, 20, np.ones((3, 37))).astype(np.float32)
        parts = dict(zip(("maxima", "columns", "tiles"), statistics_by_the_book(x, 6.0, 32), strict=True))
        parts |= {"x": on_device(x), "codes": on_device(np.full((5, 37), 127, np.int8))}
        parts |= {"absmax": on_device(np.ones(5, np.float32)), "exact": on_device(np.ones((5, 37), np.float32))}
        parts[which] = walled(parts[which], begins)
        statistics = parts["maxima"], parts["columns"], parts["tiles"]
        blocks = {"block_m": 16, "block_n": 16, "block_k": 32, "warps": 4, "stages": 2}
        found = llm_int8.multiply(parts["x"], statistics, parts["codes"], parts["absmax"], parts["exact"], blocks)
        np.testing.assert_allclose(found.cpu().numpy(), 56, rtol=1e-6)
