"""Batch priority: the order and the losses against loops and published code, the kernel against the reference."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.moe import batch_priority, routing
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.moe.lines import SEEDS, SIZES, by_loop, choices, drawn_logits

PRIORITY = pytest.mark.exercise("chapters.moe.batch_priority.priority", points=1)
IMPORTANCE = pytest.mark.exercise("chapters.moe.batch_priority.importance_loss", points=1)
LOAD = pytest.mark.exercise("chapters.moe.batch_priority.load_loss", points=3)
TALLY = pytest.mark.exercise("kernels.moe.batch_priority.tally", points=4)

fast = kernel("moe.batch_priority")
few_examples = settings(max_examples=max(settings.default.max_examples // 3, 10))  # ~100 ms each in the interpreter


def by_sorting(score: np.ndarray) -> list[int]:
    """The definition of the order of service."""
    return sorted(range(len(score)), key=lambda t: (-float(score[t]), t))


def drawn_scores(tokens: int, seed: int, spread: float) -> np.ndarray:
    """Scores of which many are equal, all of them for a spread of 0."""
    return np.rint(4 * spread * np.random.default_rng(seed).normal(size=tokens)) / 4


# --- the order ----------------------------------------------------------------------------------------------------


@PRIORITY
@given(st.sampled_from([1, 2, 7, 33, 200]), SEEDS, st.sampled_from([0.0, 0.5, 1e3]),
       st.sampled_from([np.float16, np.float32, np.float64]))  # fmt: skip
def test_the_largest_score_is_served_first_and_of_equal_ones_the_first(tokens, seed, spread, dtype):
    score = drawn_scores(tokens, seed, spread).astype(dtype)
    before = score.copy()
    order = batch_priority.priority(score)
    assert order.tolist() == by_sorting(score) and order.dtype == np.int64
    np.testing.assert_array_equal(score, before)


@PRIORITY
def test_exactly_these_orders():
    """Infinite scores, zeros of both signs, and such as are equal in float32 only."""
    assert batch_priority.priority(np.array([0.5, 0.9, 0.1, 0.9, 0.5, 0.5])).tolist() == [1, 3, 0, 4, 5, 2]
    assert batch_priority.priority(np.array([-np.inf, 0.0, -0.0, np.inf, 0.0, np.inf])).tolist() == [3, 5, 1, 2, 4, 0]
    assert batch_priority.priority(np.array([1.0, 1 + 1e-12, 1e300, 2e300])).tolist() == [3, 2, 1, 0]
    nobody = batch_priority.priority(np.zeros(0, np.float32))
    assert nobody.shape == (0,) and nobody.dtype == np.int64


@PRIORITY
@pytest.mark.parametrize("score", [np.array([0.1, np.nan]), np.zeros((2, 2)), np.float64(1)])
def test_scores_that_have_no_order_are_refused(score):
    with pytest.raises(ValueError):
        batch_priority.priority(score)


@given(choices(), SEEDS, st.sampled_from([0.0, 0.5]))
def test_lines_form_in_that_order(chosen, seed, spread):
    expert, experts = chosen
    score = drawn_scores(len(expert), seed, spread)
    rank, slot, load = batch_priority.queue(expert, score, experts)
    order = np.array(by_sorting(score))
    wanted = by_loop(expert, experts, "choice", order)
    np.testing.assert_array_equal(rank[order], np.arange(len(order)))
    np.testing.assert_array_equal(slot, wanted[0])
    np.testing.assert_array_equal(load, wanted[1])
    assert rank.dtype == slot.dtype == load.dtype == np.int64


# --- losses -------------------------------------------------------------------------------------------------------


def squared_variation(amount: list[float], correction: int) -> float:
    """The definition."""
    mean = math.fsum(amount) / len(amount)
    return math.fsum((one - mean) ** 2 for one in amount) / (len(amount) - correction) / mean**2


@IMPORTANCE
@given(SIZES, SEEDS, st.integers(0, 1), st.sampled_from([1.0, 1e-6, 1e6]))
def test_the_importance_loss_is_its_definition(sizes, seed, correction, scale):
    tokens, experts = sizes[0], sizes[1] + 1
    p = scale * np.random.default_rng(seed).dirichlet(np.full(experts, 0.5), tokens)
    before = p.copy()
    found = batch_priority.importance_loss(p, correction)
    wanted = squared_variation([math.fsum(p[:, e]) for e in range(experts)], correction)
    np.testing.assert_allclose(found, wanted, **tolerance(np.float64, tokens * experts))
    np.testing.assert_array_equal(p, before)


@IMPORTANCE
def test_exactly_these_importance_losses():
    """Even, all to one of 8, no gates at all, and the sample's variance only when asked for."""
    assert batch_priority.importance_loss(np.full((3, 8), 0.125)) == pytest.approx(0)
    assert batch_priority.importance_loss(np.tile(np.eye(8)[3], (5, 1))) == pytest.approx(7)
    assert batch_priority.importance_loss(np.tile(np.eye(8)[3], (5, 1)), 1) == pytest.approx(8)
    assert batch_priority.importance_loss(np.eye(4)) == pytest.approx(0)
    assert batch_priority.importance_loss(np.zeros((3, 4))) == 0
    assert batch_priority.importance_loss(np.ones((3, 1))) == 0
    for size in (1e-200, 1e200):
        assert batch_priority.importance_loss(size * np.eye(4)[:2]) == pytest.approx(1)


@IMPORTANCE
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_gates_are_added_in_double_precision(dtype):
    p = (3e4 * np.random.default_rng(0).dirichlet(np.full(8, 50.0), 500)).astype(dtype)
    found, wanted = batch_priority.importance_loss(p), batch_priority.importance_loss(p.astype(np.float64))
    assert isinstance(found, float)
    np.testing.assert_allclose(found, wanted, **tolerance(np.float64))


@IMPORTANCE
@pytest.mark.parametrize(("p", "correction"), [(np.ones(4), 0), (np.ones((0, 4)), 0), (np.ones((4, 1)), 1),
                                               (np.ones((2, 3, 4)), 0), (np.ones((4, 0)), 0),
                                               (np.array([[0.5, np.nan]]), 0),
                                               (np.array([[0.5, np.inf]]), 0)])  # fmt: skip
def test_importance_of_nothing_is_refused(p, correction):
    with pytest.raises(ValueError):
        batch_priority.importance_loss(p, correction)


@IMPORTANCE
def test_golden_importance_loss_of_vmoe():
    arrays = golden("sparse/vmoe_routing")
    found = batch_priority.importance_loss(arrays["gates"].astype(np.float64))
    np.testing.assert_allclose(found, arrays["importance_loss"], **tolerance(np.float32))


@LOAD
@given(SIZES, SEEDS, st.sampled_from([0.125, 1.0, 3.0]), st.integers(0, 1))
def test_the_load_loss_is_its_definition(sizes, seed, std, correction):
    (tokens, experts, k), rng = sizes, np.random.default_rng(seed)
    experts += 1
    logits = rng.normal(size=(tokens, experts))
    noisy = logits + std * rng.normal(size=logits.shape)
    before = logits.copy(), noisy.copy()
    load = [0.0] * experts
    for t in range(tokens):
        threshold = sorted(noisy[t], reverse=True)[k - 1]
        for e in range(experts):
            load[e] += 1 - NormalDist(logits[t, e], std).cdf(threshold)
    found = batch_priority.load_loss(logits, noisy, k, std, correction)
    np.testing.assert_allclose(found, squared_variation(load, correction), rtol=1e-9)  # 1 - Φ has 16 digits of 1
    np.testing.assert_array_equal(logits, before[0])
    np.testing.assert_array_equal(noisy, before[1])


@LOAD
def test_exactly_these_load_losses():
    """Nobody far below passes, everybody far above does, and of equal logits each passes half of the time."""
    low = np.array([[0.0, -50.0, -50.0, -50.0]])
    assert batch_priority.load_loss(low, low, 1, 0.1) == pytest.approx(3)
    assert batch_priority.load_loss(low, low, 2, 0.1) == pytest.approx(squared_variation([1, 0.5, 0.5, 0.5], 0))
    assert batch_priority.load_loss(low, low + 1e3, 1, 0.1) == 0
    assert batch_priority.load_loss(low, low - 1e3, 1, 0.1) == pytest.approx(0)
    assert batch_priority.load_loss(low, low + 3, 1, 0.1) == pytest.approx(3)  # a load of 1e-198, whose square is 0
    assert batch_priority.load_loss(low[:, :1], low[:, :1], 1, 0.1) == 0


@LOAD
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_logits_are_compared_in_double_precision(dtype):
    rng = np.random.default_rng(0)
    logits, noisy = rng.normal(size=(2, 300, 5)).astype(dtype)
    found = batch_priority.load_loss(logits, noisy, 2, 0.5)
    wanted = batch_priority.load_loss(logits.astype(np.float64), noisy.astype(np.float64), 2, 0.5)
    assert isinstance(found, float)
    np.testing.assert_allclose(found, wanted, **tolerance(np.float64))


@LOAD
@pytest.mark.parametrize("changed", [
    {"noisy": np.zeros((3, 3))}, {"k": 0}, {"k": 5}, {"std": 0.0}, {"std": math.inf}, {"std": math.nan},
    {"logits": np.full((3, 4), np.nan)}, {"noisy": np.full((3, 4), np.inf)}, {"std": -1.0},
    {"noisy": np.zeros((3, 5))}, {"noisy": np.zeros((1, 4))}, {"logits": np.zeros(4), "noisy": np.zeros(4)},
    {"logits": np.zeros((3, 0)), "noisy": np.zeros((3, 0)), "k": 0},
    {"logits": np.zeros((2, 3, 4)), "noisy": np.zeros((2, 3, 4))},
    {"logits": np.zeros((0, 4)), "noisy": np.zeros((0, 4))},
    {"logits": np.zeros((3, 1)), "noisy": np.zeros((3, 1)), "k": 1, "correction": 1},
])  # fmt: skip
def test_a_load_that_cannot_be_expected_is_refused(changed):
    arguments = {"logits": np.zeros((3, 4)), "noisy": np.zeros((3, 4)), "k": 2, "std": 0.1} | changed
    with pytest.raises(ValueError):
        batch_priority.load_loss(**arguments)


@LOAD
def test_golden_load_losses_of_vmoe():
    arrays = golden("sparse/vmoe_routing")
    logits, noise = (arrays[name].astype(np.float64) for name in ("logits", "noise"))
    for k in (1, 2):
        found = batch_priority.load_loss(logits, logits + noise, k, 1 / 8)
        np.testing.assert_allclose(found, arrays[f"load_loss_k{k}"], **tolerance(np.float32))


def test_golden_loss_of_tutel_is_the_mean_of_both_over_the_sample():
    """It takes softmax scores where V-MoE takes logits; the noise is on the logits."""
    arrays = golden("sparse/tutel_routing")
    logits, noise = (arrays[name].astype(np.float64) for name in ("logits", "noise"))
    p, noisy = routing.softmax(logits), routing.softmax(logits + noise)
    found = (batch_priority.importance_loss(p, 1) + batch_priority.load_loss(p, noisy, 2, 1 / 8, 1)) / 2
    np.testing.assert_allclose(found, arrays["load_importance_loss_k2_std1"], **tolerance(np.float32))


def test_bad_scores_and_losses_are_refused_in_words():
    with pytest.raises(ValueError, match="score must be a vector without NaN"):
        batch_priority.priority(np.array([np.nan]))
    with pytest.raises(ValueError, match="one number for each of 3 tokens"):
        batch_priority.queue(np.zeros((3, 1), int), np.zeros(2), 4)
    with pytest.raises(ValueError, match="more than 1 experts"):
        batch_priority.importance_loss(np.ones((3, 1)), 1)
    with pytest.raises(ValueError, match="positive, finite std, got k=1 and std=0"):
        batch_priority.load_loss(np.ones((3, 2)), np.ones((3, 2)), 1, 0)


# --- the kernel ---------------------------------------------------------------------------------------------------


def assert_queues_alike(found, wanted) -> None:
    """(rank, slot, load) as int32 tensors against the reference's, exactly."""
    for part, right in zip(found, wanted, strict=True):
        assert part.dtype == torch.int32
        np.testing.assert_array_equal(part.cpu().numpy(), right)


@TALLY
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@few_examples
@given(chosen=choices(), seed=SEEDS, spread=st.sampled_from([0.0, 0.5, 1e3]), aligned=st.booleans(),
       index=st.sampled_from([np.int32, np.int64]))  # fmt: skip
def test_kernel_counts_the_places_of_the_reference(dtype, chosen, seed, spread, aligned, index):
    expert, experts = chosen
    score = torch.from_numpy(drawn_scores(len(expert), seed, spread)).to(dtype).to(DEVICE)
    there = torch.from_numpy(expert.astype(index)).to(DEVICE)
    found = fast.queue(poisoned(there, aligned), poisoned(score, aligned), experts, block=16, chunk=16)
    assert_queues_alike(found, oracle("moe.batch_priority").queue(expert, score.float().cpu().numpy(), experts))


@TALLY
@pytest.mark.kernel
@pytest.mark.parametrize("chunk", [16, 64])
def test_kernel_counts_across_many_blocks(chunk):
    """Four blocks, the last not full; chunks that end within, at and behind the block; ties on both sides."""
    logits = drawn_logits(55, 6, 1, 1.0).numpy()
    expert, score = routing.choose(logits, 2), drawn_scores(55, 2, 0.4).astype(np.float32)
    there = poisoned(torch.from_numpy(expert).to(DEVICE)), poisoned(torch.from_numpy(score).to(DEVICE))
    found = fast.queue(*there, 6, block=16, chunk=chunk)
    assert_queues_alike(found, oracle("moe.batch_priority").queue(expert, score, 6))


@TALLY
@pytest.mark.kernel
def test_kernel_ranks_infinite_scores_and_takes_nan_for_the_lowest():
    score = np.array([np.nan, 0.0, -0.0, np.inf, -np.inf, np.nan, np.inf, -np.inf] * 5, np.float32)
    expert = np.arange(40)[:, None] % 3
    there = torch.from_numpy(expert).to(DEVICE), torch.from_numpy(score).to(DEVICE)
    wanted = oracle("moe.batch_priority").queue(expert, np.where(np.isnan(score), -np.inf, score), 3)
    assert_queues_alike(fast.queue(*there, 3, block=16, chunk=16), wanted)


@TALLY
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernel_reads_nothing_outside_its_inputs(begins):
    expert, score = torch.arange(38).view(19, 2) % 5, torch.linspace(0, 1, 19)
    fast.queue(walled(expert.to(DEVICE), begins), walled(score.to(DEVICE), begins), 5, block=16, chunk=16)


@pytest.mark.kernel
@pytest.mark.parametrize(("changed", "error"), [
    ({"score": torch.zeros(4)}, ValueError), ({"expert": torch.zeros(3, dtype=torch.int64)}, ValueError),
    ({"expert": torch.zeros(0, 2, dtype=torch.int64), "score": torch.zeros(0)}, ValueError),
    ({"experts": 0}, ValueError), ({"expert": torch.zeros(3, 20, dtype=torch.int64)}, ValueError),
    ({"expert": torch.zeros(3, 2)}, TypeError),
    ({"expert": torch.zeros(20000, 2, dtype=torch.int64), "score": torch.zeros(20000)}, ValueError),
    ({"score": torch.zeros(3, dtype=torch.float64)}, TypeError), ({"score": torch.zeros(6)[::2]}, ValueError),
])  # fmt: skip
def test_kernel_refuses_what_it_cannot_serve(changed, error):
    arguments = {"expert": torch.zeros(3, 2, dtype=torch.int64), "score": torch.zeros(3), "experts": 4} | changed
    with pytest.raises(error):
        fast.queue(**arguments)
