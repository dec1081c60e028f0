"""OBQ, GPTQ's ancestor: against a loop that inverts what is left of the Hessian. Its authors' code: test_gptq.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import gptq as chapter
from chapters.quantization.gptq import obq
from tests.quantization.problems import Layer, cheapest_first, grid_of_row, keep_only, layers, nearest

BITS = st.sampled_from([1, 2, 3, 4])
GOOD = {"weight": np.eye(4) + 0.5, "hessian": np.eye(4), "bits": 4}


@pytest.fixture
def others_from_the_book(monkeypatch):
    """What `obq` may call comes from the book, whether or not it is written yet."""
    keep_only("obq", chapter, monkeypatch)


@pytest.mark.exercise("chapters.quantization.gptq.obq", points=3)
@pytest.mark.usefixtures("others_from_the_book")
class TestObq:
    @given(layers(columns=(1, 2, 7, 12)), BITS, st.sampled_from([0.01, 0.3]), st.sampled_from([0, 0.3]))
    def test_equals_elimination_one_weight_at_a_time(self, layer, bits, damping, zeros):
        layer.weight[np.random.default_rng(0).random(layer.weight.shape) < zeros] = 0
        found = obq(layer.weight, layer.hessian, bits, damping=damping)
        np.testing.assert_array_equal(found.codes, cheapest_first(layer, bits, damping))

    @given(layers(dead=False), BITS, st.integers(0, 2**32 - 1))
    def test_is_rounding_to_nearest_where_columns_do_not_interact(self, layer, bits, seed):
        diagonal = np.diag(np.random.default_rng(seed).uniform(0.1, 10, layer.weight.shape[1]))
        found = obq(layer.weight, diagonal, bits)
        grids = [grid_of_row(row, bits, False) for row in layer.weight]
        expected = [[nearest(w, *grid, bits) for w in row] for row, grid in zip(layer.weight, grids, strict=True)]
        np.testing.assert_array_equal(found.codes, expected)

    @given(layers(dead=False), BITS)
    def test_rows_do_not_know_of_each_other(self, layer, bits):
        found = obq(layer.weight, layer.hessian, bits, damping=0.1).codes
        alone = [obq(row[None], layer.hessian, bits, damping=0.1).codes[0] for row in layer.weight]
        np.testing.assert_array_equal(found, alone)

    def test_zeros_go_before_outliers(self):
        weight, hessian = np.full((1, 48), 0.2), np.eye(48)  # so many alike that the grid gives up the single 1
        weight[0, [3, 7]], hessian[[3, 7], [7, 3]] = [0, 1], 0.9
        found = obq(weight, hessian, 1, mse=True)
        assert found.scale[0, 0] < 0.5 and found.dequantize()[0, 3] == 0

    @given(layers(columns=(7, 12), dead=False), BITS)
    def test_zeros_stay_and_take_no_part(self, layer, bits):
        columns = layer.weight.shape[1]
        gone, kept = np.arange(columns) % 3 == 1, np.arange(columns) % 3 != 1
        layer.weight[:, gone] = 0
        damped = layer.hessian + 0.1 * np.diag(layer.hessian).mean() * np.eye(columns)
        found = obq(layer.weight, damped, bits)
        np.testing.assert_array_equal(found.dequantize()[:, gone], 0)
        without = obq(layer.weight[:, kept], damped[np.ix_(kept, kept)], bits)
        np.testing.assert_array_equal(found.codes[:, kept], without.codes)

    def test_an_outlier_goes_first(self):
        weight = np.array([[-0.4, 3.0, 1.1, -0.05]])  # one bit; 1.1 lies far from both values
        h = np.array([[2.0, 0.5, 0.9, 0.1], [0.5, 3.0, 0.2, 0.1], [0.9, 0.2, 1.0, 0.4], [0.1, 0.1, 0.4, 1.5]])
        layer = Layer(weight, np.linalg.cholesky(h / 2).T)
        np.testing.assert_array_equal(obq(weight, h, 1).codes, cheapest_first(layer, 1, 0.0))

    def test_dead_columns_become_zero_and_grids_do_not_see_them(self):
        found = obq(np.array([[9.0, 1.0, -1.0]]), np.diag([0.0, 1.0, 1.0]), 4)
        assert found.dequantize()[0, 0] == 0
        np.testing.assert_allclose(found.scale, 2 / 15)

    @pytest.mark.parametrize(("symmetric", "mse"), [(True, False), (False, True), (True, True)])
    def test_fits_the_grid_as_asked(self, symmetric, mse):
        weight = np.random.default_rng(1).standard_normal((3, 12))
        found = obq(weight, np.eye(12), 3, symmetric, mse)
        scale, zero = chapter.find_grid(weight, 3, symmetric, mse)
        np.testing.assert_array_equal(found.scale[:, 0], scale)
        np.testing.assert_array_equal(found.zero[:, 0], zero)

    def test_the_result_is_complete_and_the_arguments_stay(self):
        weight, h = np.array([[3.0, 1.0, -1.0], [0.5, 0.25, 2.0]], np.float32), np.diag([0.0, 1.0, 2.0])
        copies = weight.copy(), h.copy()
        found = obq(weight, h, 2)
        assert found.bits == 2 and found.codes.dtype == np.uint8 and found.codes.shape == (2, 3)
        assert found.scale.shape == found.zero.shape == (2, 1) and found.scale.dtype == np.float64
        np.testing.assert_array_equal(found.group_of_column, [0, 0, 0])
        np.testing.assert_array_equal(weight, copies[0])
        np.testing.assert_array_equal(h, copies[1])

    @pytest.mark.parametrize(
        "wrong",
        [
            {"bits": 0},
            {"bits": 9},
            {"weight": np.full((2, 4), np.nan)},
            {"weight": np.ones(4)},
            {"hessian": np.eye(3)},
            {"hessian": np.ones((4, 4))},
            {"hessian": np.tril(np.ones((4, 4)))},
            {"damping": -0.1},
            {"damping": np.nan},
        ],
    )
    def test_refuses_what_its_docstring_excludes(self, wrong):
        with pytest.raises(ValueError):
            obq(**(GOOD | wrong))


def test_on_a_benign_layer_it_beats_gptq_which_beats_rounding():
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((16, 32)), rng.standard_normal((200, 32)) @ (np.eye(32) + 0.3)
    hessian = x.T @ x
    found = [solve(weight) for solve in (
        lambda w: obq(w, hessian, 4, damping=0.01), lambda w: chapter.gptq(w, hessian, 4),
        lambda w: chapter.round_to_nearest(w, 4),
    )]  # fmt: skip
    losses = [np.sum((x @ (weight - held.dequantize()).T) ** 2) for held in found]
    assert losses == sorted(losses)
