"""Routing: each step against a loop, all of it against published code and laws, the kernel against the reference."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.moe import routing
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.fences import walled
from tests.moe.lines import BY, RENORMALISE, SEEDS, SIZES, arrivals, assert_routes_alike, by_loop, choices, drawn_logits

CAPACITY = pytest.mark.exercise("chapters.moe.routing.capacity", points=1)
QUEUE = pytest.mark.exercise("chapters.moe.routing.queue", points=3)
WEIGH = pytest.mark.exercise("chapters.moe.routing.weigh", points=2)
BALANCE = pytest.mark.exercise("chapters.moe.routing.balance_loss", points=2)
PLACE = pytest.mark.exercise("kernels.moe.routing.place_block", points=4)

fast = kernel("moe.routing")


# --- capacity -----------------------------------------------------------------------------------------------------


@CAPACITY
@given(tokens=st.integers(1, 300), experts=st.integers(1, 64), k=st.integers(1, 4), factor=st.sampled_from(
    [0.25, 0.5, 1.0, 1.25, 2.0]), rule=st.sampled_from(["round", "ceil", "floor"]), multiple=st.integers(1, 8),
    least=st.integers(1, 9))  # fmt: skip
def test_capacity_is_the_fair_share_by_its_rule(tokens, experts, k, factor, rule, multiple, least):
    found = routing.capacity(tokens, experts, k, factor, rule, multiple, least)
    share = Fraction(factor) * k * tokens / experts
    whole = {"round": round(share), "ceil": math.ceil(share), "floor": math.floor(share)}[rule]
    wanted = next(n for n in range(1, 10_000) if n >= max(whole, least) and n % multiple == 0)
    assert found == wanted and isinstance(found, int)


@CAPACITY
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((5, 2), 2), ((7, 2), 4), ((1, 8), 1), ((64, 8, 2, 0.5, "ceil", 4), 8), ((64, 8, 1, 1.05, "ceil", 4), 12),
     ((64, 8, 1, 0.25, "ceil", 1, 4), 4), ((10, 1, 1, 1.0, "floor", 4, 5), 12), ((3, 8, 1, 1.0, "floor", 4), 4),
     ((15, 7, 1, 0.7), 2), ((5, 3, 3, 0.7), 3)],
)  # fmt: skip
def test_exactly_these_capacities(arguments, expected):
    """Halves go to the even number, even if rounding on the way makes them; `least` comes before `multiple`."""
    assert routing.capacity(*arguments) == expected


@CAPACITY
@pytest.mark.parametrize("changed", [
    {"tokens": 0}, {"experts": 0}, {"k": 0}, {"multiple": 0}, {"least": 0}, {"least": -1}, {"rule": "up"},
    {"factor": 0.0}, {"factor": -1.0}, {"factor": math.inf}, {"factor": math.nan},
])  # fmt: skip
def test_a_capacity_of_nothing_is_refused(changed):
    with pytest.raises(ValueError):
        routing.capacity(**{"tokens": 8, "experts": 2, **changed})


# --- lines --------------------------------------------------------------------------------------------------------


@QUEUE
@given(choices(), BY, st.booleans(), SEEDS)
def test_a_place_is_the_number_of_those_served_before(chosen, by, shuffled, seed):
    expert, experts = chosen
    arrival = arrivals(len(expert), seed) if shuffled else None
    before = expert.copy()
    slot, load = routing.queue(expert, experts, by, arrival)
    wanted = by_loop(expert, experts, by, arrival)
    np.testing.assert_array_equal(slot, wanted[0])
    np.testing.assert_array_equal(load, wanted[1])
    assert slot.dtype == load.dtype == np.int64 and load.shape == (experts,)
    np.testing.assert_array_equal(expert, before)


@QUEUE
def test_exactly_these_places():
    """By choice, unless told otherwise; nobody wants expert 3."""
    expert = np.array([[0, 1], [0, 2], [1, 0]], dtype=np.int32)
    slot, load = routing.queue(expert, 4)
    assert slot.tolist() == [[0, 1], [1, 0], [0, 2]] and load.tolist() == [3, 2, 1, 0]
    assert slot.dtype == load.dtype == np.int64
    assert routing.queue(expert, 4, "token")[0].tolist() == [[0, 0], [1, 0], [1, 2]]
    assert routing.queue(expert, 4, "token", np.array([1, 2, 0]))[0].tolist() == [[2, 1], [0, 0], [0, 1]]


@QUEUE
@pytest.mark.parametrize("case", [
    ([[0, 4]], 4, "choice", None), ([[-1, 0]], 4, "choice", None), ([[0], [1]], 2, "tokens", None),
    ([[0], [1]], 2, "choice", [0, 0]), ([[0], [1]], 2, "choice", [0]), ([[0], [1]], 2, "token", [1, 2]),
])  # fmt: skip
def test_a_line_that_cannot_form_is_refused(case):
    expert, experts, by, arrival = case
    with pytest.raises(ValueError):
        routing.queue(np.array(expert), experts, by, None if arrival is None else np.array(arrival))


@QUEUE
@pytest.mark.parametrize("case", ["k1_bpr0_cf0.5_norm0", "k2_bpr0_cf0.0_norm1"])
def test_golden_places_of_tutel(case):
    arrays = golden("sparse/tutel_routing")
    expert = arrays[f"{case}__expert"].T.astype(np.int64)
    slot, load = routing.queue(expert, arrays["logits"].shape[1])
    np.testing.assert_array_equal(slot, arrays[f"{case}__slot"].T)
    np.testing.assert_array_equal(load, arrays[f"{case}__dispatch_count"])


@QUEUE
def test_golden_places_of_vmoe():
    arrays = golden("sparse/vmoe_routing")
    for k in (1, 2):
        expert = arrays[f"k{k}_bpr0_cf0.5_mult4__expert"].astype(np.int64)
        np.testing.assert_array_equal(routing.queue(expert, 8)[0], arrays[f"k{k}_bpr0_cf0.5_mult4__slot"])


# --- weights ------------------------------------------------------------------------------------------------------


@WEIGH
@given(SIZES, RENORMALISE, SEEDS, st.sampled_from([np.float32, np.float64]))
def test_weights_are_gates_over_the_sum_that_their_rule_names(sizes, renormalise, seed, dtype):
    tokens, experts, k = sizes
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(experts, 0.5), tokens).astype(dtype)
    expert, kept = p.argsort(axis=1)[:, ::-1][:, :k], rng.random((tokens, k)) < 0.6
    weight, before = routing.weigh(p, expert, kept, renormalise), (p.copy(), kept.copy())
    assert weight.shape == (tokens, k) and weight.dtype == dtype
    for t in range(tokens):
        gates = [float(p[t, e]) for e in expert[t]]
        stayed = math.fsum(g for g, stays in zip(gates, kept[t], strict=True) if stays)
        total = {"never": 1.0, "before": math.fsum(gates), "after": stayed}[renormalise]
        wanted = [g / total if stays and total else 0.0 for g, stays in zip(gates, kept[t], strict=True)]
        np.testing.assert_allclose(weight[t], wanted, **tolerance(dtype, k))
    np.testing.assert_array_equal(p, before[0])
    np.testing.assert_array_equal(kept, before[1])


@WEIGH
@pytest.mark.parametrize("renormalise", ["never", "before", "after"])
def test_nothing_to_divide_by_gives_weights_of_zero(renormalise):
    p = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    weight = routing.weigh(p, np.array([[1, 2], [0, 1]]), np.array([[True, True], [False, False]]), renormalise)
    np.testing.assert_array_equal(weight, 0)


@WEIGH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiny_gates_are_renormalised_like_others(dtype):
    p, expert = np.array([[1.0, 3e-12, 1e-12]], dtype), np.array([[1, 2]])
    for renormalise, kept, expected in (("before", [1, 1], [0.75, 0.25]), ("after", [0, 1], [0.0, 1.0])):
        weight = routing.weigh(p, expert, np.array([kept], bool), renormalise)
        np.testing.assert_allclose(weight, [expected], **tolerance(dtype))


@WEIGH
def test_the_default_is_never_and_another_rule_is_refused():
    p, expert, kept = np.array([[0.5, 0.3, 0.2]]), np.array([[0, 1]]), np.array([[True, False]])
    np.testing.assert_array_equal(routing.weigh(p, expert, kept), [[0.5, 0.0]])
    with pytest.raises(ValueError):
        routing.weigh(p, expert, kept, "always")


@WEIGH
@pytest.mark.parametrize("cf", ["0.5", "1.0"])
@pytest.mark.parametrize("case", ["top2_nosample_cf{}_min4", "topk2_position_cf{}_min4"])
def test_golden_weights_of_deepspeed_are_renormalised_after_dropping(case, cf):
    arrays, name = golden("sparse/deepspeed_moe_routing"), case.format(cf)
    kept, p = arrays[f"{name}__expert"].T >= 0, softmax64(arrays["logits"])
    expert = np.argsort(-p, axis=1, kind="stable")[:, :2]
    found = routing.weigh(p, expert, kept, "after")
    np.testing.assert_allclose(found, arrays[f"{name}__gate"].T, **tolerance(np.float32))


@WEIGH
@pytest.mark.parametrize(("case", "renormalise"), [("k2_bpr0_cf0.5_norm1", "before"), ("k1_bpr0_cf0.5_norm0", "never")])
def test_golden_weights_of_tutel_are_renormalised_before(case, renormalise):
    """Tutel leaves the weights of what it drops as they are, and drops by the slot."""
    arrays = golden("sparse/tutel_routing")
    kept = arrays[f"{case}__slot"].T < arrays[f"{case}__capacity"]
    expert = arrays[f"{case}__expert"].T.astype(np.int64)
    found = routing.weigh(softmax64(arrays["logits"]), expert, kept, renormalise)
    np.testing.assert_allclose(found, arrays[f"{case}__gate"].T * kept, **tolerance(np.float32))


def softmax64(logits: np.ndarray) -> np.ndarray:
    """The definition."""
    p = np.exp(logits.astype(np.float64))
    return p / p.sum(axis=1, keepdims=True)


# --- losses -------------------------------------------------------------------------------------------------------


@BALANCE
@given(SIZES, SEEDS)
def test_the_balance_loss_is_its_definition(sizes, seed):
    tokens, experts, k = sizes
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(experts, 0.5), tokens)
    expert = rng.random(p.shape).argsort(axis=1)[:, :k]  # not only the likeliest: the loss may be less than 1
    share = [sum(int(e) == one for row in expert for one in row) / (tokens * k) for e in range(experts)]
    wanted = experts * math.fsum(f * math.fsum(p[:, e]) / tokens for e, f in enumerate(share))
    found = routing.balance_loss(p, expert)
    assert isinstance(found, float)
    np.testing.assert_allclose(found, wanted, **tolerance(np.float64, tokens, experts))


@BALANCE
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_balance_loss_lies_between_one_and_the_number_of_experts(k):
    expert = (np.arange(8)[:, None] + np.arange(k)) % 8
    even, one = np.full((8, 8), 0.125), np.tile(np.eye(8)[0], (8, 1))
    assert routing.balance_loss(even, expert) == pytest.approx(1)
    assert routing.balance_loss(one, np.zeros((8, 1), int)) == pytest.approx(8)


@BALANCE
def test_golden_balance_losses():
    """GShard, V-MoE and Tutel count first choices; DeepSpeed's top-k all of them, as shares."""
    arrays = golden("sparse/deepspeed_moe_routing")
    p = softmax64(arrays["logits"])
    expert = np.argsort(-p, axis=1, kind="stable")
    for k, name in ((1, "top1_rts_cf0.5_min4"), (2, "topk2_position_cf0.5_min4"), (4, "topk4_position_cf1.0_min4")):
        found = routing.balance_loss(p, expert[:, :k])
        np.testing.assert_allclose(found, arrays[f"{name}__l_aux"], **tolerance(np.float32))


@BALANCE
@pytest.mark.parametrize(
    ("p", "expert"), [((3, 4), (2, 1)), ((0, 4), (0, 1)), ((3, 4), (3, 0)), ((4,), (4, 1)), ((3, 4), (3,))]
)
def test_a_balance_of_nothing_is_refused(p, expert):
    with pytest.raises(ValueError):
        routing.balance_loss(np.zeros(p), np.zeros(expert, int))


# --- the kernel ---------------------------------------------------------------------------------------------------


@PLACE
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@given(sizes=SIZES, by=BY, renormalise=RENORMALISE, seed=SEEDS, spread=st.sampled_from([0.0, 1.0, 30.0]),
       shuffled=st.booleans(), aligned=st.booleans())  # fmt: skip
def test_kernel_routes_like_the_reference(dtype, sizes, by, renormalise, seed, spread, shuffled, aligned):
    (tokens, experts, k), rng = sizes, np.random.default_rng(seed)
    logits = drawn_logits(tokens, experts, seed, spread).to(dtype).to(DEVICE)
    capacity, arrival = int(rng.integers(1, tokens + 1)), arrivals(tokens, seed) if shuffled else None
    there = None if arrival is None else poisoned(torch.from_numpy(arrival).to(DEVICE))
    found = fast.route(poisoned(logits, aligned), k, capacity, renormalise, None, by, there, block=16)
    wanted = oracle("moe.routing").route(logits.float().cpu().numpy(), k, capacity, renormalise, None, by, arrival)
    assert [part.dtype for part in found] == [torch.int32, torch.float32, torch.int32, torch.int32]
    assert_routes_alike(found, wanted, experts)


@PLACE
@pytest.mark.kernel
@pytest.mark.parametrize("by", ["choice", "token"])
def test_kernel_counts_across_many_blocks(by):
    """Seven blocks of 16, the last not full, for fewer counts a step than there are blocks."""
    logits = drawn_logits(99, 64, 1, 1.0).to(DEVICE)
    found = fast.route(poisoned(logits), 3, 4, "after", None, by, block=16)
    assert_routes_alike(found, oracle("moe.routing").route(logits.cpu().numpy(), 3, 4, "after", None, by), 64)


@PLACE
@pytest.mark.kernel
@pytest.mark.parametrize("begins", [False, True])
def test_kernel_reads_nothing_outside_its_inputs(begins):
    logits, arrival = drawn_logits(19, 5, 0, 1.0).to(DEVICE), torch.from_numpy(arrivals(19, 0)).to(DEVICE)
    noise, there = walled(logits, begins), walled(arrival, begins)
    fast.route(walled(logits, begins), 2, 4, "never", noise, "token", there, block=16)
