"""What SparseGPT is a case of and what are cases of it: OBD, OBS, Wanda, GPTQ, and rounding with pruning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chapters.pruning import sparsegpt as chapter
from chapters.pruning.sparsegpt import obs_step, solve_block, sparsegpt
from tests.conftest import golden, oracle, tolerance
from tests.pruning.eliminated import close, damped, one_gone, pivots_of
from tests.quantization.problems import grid_of_row, layers
from tests.sparsity.drawn import SEEDS


@given(layers(dead=False), SEEDS)
def test_obd_is_obs_of_a_diagonal_hessian(layer, seed):
    diagonal = np.random.default_rng(seed).uniform(0.1, 10, layer.weight.shape[1])
    inverse = np.diag(1 / diagonal)
    expected = chapter.obd_scores(layer.weight, np.diag(diagonal))
    np.testing.assert_allclose(chapter.obs_scores(layer.weight, inverse), expected, **tolerance(np.float64))
    gone = [seed % len(diagonal)] * len(layer.weight)
    moved, _ = obs_step(layer.weight, np.repeat(inverse[None], len(layer.weight), axis=0), np.array(gone))
    np.testing.assert_array_equal(moved, np.where(np.arange(len(diagonal)) == gone[0], 0, layer.weight))


@given(layers(dead=False))
def test_a_score_is_what_the_loss_rises_by(layer):
    h = damped(layer.hessian, 0.01)
    scores = chapter.obs_scores(layer.weight, np.linalg.inv(h))
    for row, w in enumerate(layer.weight):
        change = w - one_gone(w, h, [0])
        np.testing.assert_allclose(change @ h @ change / 2, scores[row, 0], rtol=1e-8)
    rise = chapter.obd_scores(layer.weight, h)[:, 0]  # nothing else moves
    np.testing.assert_allclose(rise, layer.weight[:, 0] ** 2 * h[0, 0] / 2, **tolerance(np.float64))
    assert (scores[:, 0] <= rise * (1 + 1e-9)).all()


@given(layers(dead=False))
def test_dropping_the_first_column_is_a_step_of_obs(layer):
    mask = np.arange(layer.weight.shape[1]) + 0 * layer.weight > 0
    upper = np.linalg.cholesky(np.linalg.inv(damped(layer.hessian, 0.01))).T
    inverse = np.repeat((upper.T @ upper)[None], len(mask), axis=0)
    found = solve_block(layer.weight, upper, mask)[0]
    expected = obs_step(layer.weight, inverse, np.zeros(len(mask), int))[0]
    np.testing.assert_allclose(found, expected, **close(len(upper), layer.weight, expected))
    np.testing.assert_allclose(np.diag(upper) ** 2, pivots_of(damped(layer.hessian, 0.01)), rtol=1e-8)


@given(layers(columns=(8, 16, 24), dead=False), SEEDS)
def test_wanda_is_the_case_of_a_diagonal_hessian(layer, seed):
    norms = np.random.default_rng(seed).uniform(0.1, 10, layer.weight.shape[1])
    found = sparsegpt(layer.weight, np.diag(2 * norms**2), pattern=(2, 4), damping=0)
    np.testing.assert_array_equal(found.weight, oracle("pruning.wanda").prune_groups(layer.weight, norms, 2, 4))


@given(layers(), st.sampled_from([1, 3, 4]), st.sampled_from([4, 128]))
def test_gptq_is_the_case_in_which_none_is_dropped(layer, bits, size):
    found = sparsegpt(layer.weight, layer.hessian, pattern=(1, 1), bits=bits, block_size=size)
    expected = oracle("quantization.gptq").gptq(layer.weight, layer.hessian, bits, block_size=size)
    np.testing.assert_array_equal(found.weight, expected.dequantize())


@given(layers(), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_obs_drops_what_costs_least_of_what_is_left(layer, sparsity):
    found, h = chapter.obs(layer.weight, layer.hessian, sparsity), damped(layer.hessian, 0.01)
    live, columns = np.where(np.diag(layer.hessian) == 0, 0, layer.weight), layer.weight.shape[1]
    for row, w in enumerate(live):
        gone: list[int] = []
        for _ in range(min(round(sparsity * columns), columns - 1)):
            left = [k for k in range(columns) if k not in gone]
            rest = one_gone(w, h, gone)[left] ** 2 / np.diag(np.linalg.inv(h[np.ix_(left, left)]))
            gone.append(left[int(rest.argmin())])
        np.testing.assert_array_equal(np.flatnonzero(~found.mask[row]), sorted(gone))
        np.testing.assert_allclose(found.weight[row], one_gone(w, h, gone), **close(columns, live))
    change = live - found.weight
    assert found.error == pytest.approx((change @ h * change).sum() / 2, rel=1e-6)


def test_joint_rounding_leaves_the_released_share_of_zeros():
    """Kept weights that round to 0 make it more than half; the share is that of the release on this layer."""
    arrays = golden("sparse/sparsegpt")
    found = sparsegpt(arrays["W"], arrays["H_fp64"], bits=4)
    assert round((found.weight == 0).mean(), 4) == 0.5208
    for row, dense in zip(found.weight, arrays["W"].astype(float), strict=True):
        scale, zero = grid_of_row(dense, 4, False)
        codes = row / scale + zero
        np.testing.assert_allclose(codes, codes.round(), atol=1e-9)
        assert codes.round().min() >= 0 and codes.round().max() <= 15
