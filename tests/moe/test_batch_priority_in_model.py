"""Batch priority as a whole: published routes, laws, what it refuses, its PyTorch twin, and a gate in a model."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from chapters.moe import batch_priority, routing
from chapters.moe.batch_priority import PriorityGate
from chapters.shared import moe_lab
from minitfm import evaluate
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import golden, tolerance
from tests.moe.lines import RENORMALISE, SEEDS, SIZES, assert_routes_alike


def golden_cases(file: str) -> list[str]:
    """The cases with batch priority of a golden file."""
    return sorted(name.removesuffix("__expert") for name in golden(file) if "_bpr1_" in name and "__expert" in name)


@pytest.mark.parametrize("case", golden_cases("sparse/vmoe_routing"))
def test_golden_routes_of_vmoe(case):
    arrays = golden("sparse/vmoe_routing")
    factor, multiple = case.split("_cf")[1].split("_mult")
    k, capacity = arrays[f"{case}__expert"].shape[1], int(arrays[f"{case}__capacity"])
    assert capacity == routing.capacity(64, 8, k, float(factor), "ceil", multiple=4 if multiple == "4" else 1)
    found = batch_priority.route(arrays["logits"], k, capacity)
    np.testing.assert_array_equal(found.expert, arrays[f"{case}__expert"])
    np.testing.assert_array_equal(found.slot, arrays[f"{case}__slot"])
    np.testing.assert_allclose(found.weight, arrays[f"{case}__combine"] * found.kept, **tolerance(np.float32))


@pytest.mark.parametrize("case", golden_cases("sparse/tutel_routing"))
def test_golden_routes_of_tutel(case):
    """Its gates are over their sum if k > 1 only; it ranks by the largest before that."""
    arrays, (renormalised, k) = golden("sparse/tutel_routing"), (case.endswith("norm1"), int(case[1]))
    rule = "before" if renormalised and k > 1 else "never"
    found = batch_priority.route(arrays["logits"], k, int(arrays[f"{case}__capacity"]), rule)
    np.testing.assert_array_equal(found.expert, arrays[f"{case}__expert"].T)
    np.testing.assert_array_equal(found.slot, arrays[f"{case}__slot"].T)
    np.testing.assert_allclose(found.weight, arrays[f"{case}__gate"].T * found.kept, **tolerance(np.float32))


def test_golden_outputs_of_vmoe():
    """Eight linear experts by `moe_lab.mix`, with two choices at half the capacity."""
    arrays = {name: torch.from_numpy(array) for name, array in golden("sparse/vmoe_routing").items()}
    found = batch_priority.prioritised(arrays["logits"], 2, routing.capacity(64, 8, 2, 0.5, "ceil", multiple=4))
    experts = [partial(torch.matmul, other=weight) for weight in arrays["e2e_We"]]
    torch.testing.assert_close(moe_lab.mix(arrays["e2e_x"], experts, found), arrays["e2e_y_k2_bpr_cf0.5"])


@given(SIZES, SEEDS)
def test_of_first_choices_each_expert_keeps_the_largest_gates(sizes, seed):
    tokens, experts, _ = sizes
    logits = np.random.default_rng(seed).normal(size=(tokens, experts))
    found, p = batch_priority.route(logits, 1, 2), routing.softmax(logits)
    for e in range(experts):
        mine = p[found.expert[:, 0] == e, e]
        kept = found.weight[(found.expert[:, 0] == e) & found.kept[:, 0], 0]
        np.testing.assert_array_equal(np.sort(kept)[::-1], np.sort(mine)[::-1][:2])


@given(SIZES, SEEDS, RENORMALISE, st.sampled_from(["max", "sum"]))
def test_who_is_served_does_not_depend_on_where_he_stands(sizes, seed, renormalise, score):
    (tokens, experts, k), rng = sizes, np.random.default_rng(seed)
    assume(experts > k)  # all gates sum to 1, and then rounding decides
    logits, turn = rng.normal(size=(tokens, experts)), rng.permutation(tokens)
    stood, turned = (batch_priority.route(x, k, 2, renormalise, score=score) for x in (logits, logits[turn]))
    np.testing.assert_array_equal(turned.slot, stood.slot[turn])
    np.testing.assert_array_equal(turned.weight, stood.weight[turn])


def test_a_later_token_takes_the_place_of_an_earlier_one():
    """Not causal; first come, first served by first choices is."""
    logits = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    for cut, kept in ((1, [True]), (2, [False, True]), (3, [False, False, True])):
        assert batch_priority.route(logits[:cut], 1, 1).kept[:, 0].tolist() == kept
        assert routing.route(logits[:cut], 1, 1).kept[:, 0].tolist() == [True, False, False][:cut]


def test_the_sum_of_gates_ranks_otherwise():
    logits = np.log(np.array([[0.5, 0.1, 0.4], [0.6, 0.2, 0.2]]))
    assert batch_priority.route(logits, 2, 1).slot[:, 0].tolist() == [1, 0]
    assert batch_priority.route(logits, 2, 1, score="sum").slot[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(("changed", "words"), [
    ({"score": "mean"}, "max"), ({"capacity": 0}, "capacity"), ({"k": 5}, "k "), ({"renormalise": "always"}, "renorm"),
    ({"logits": np.full((3, 4), np.inf)}, "finite"), ({"noise": np.zeros((3, 1))}, "noise must be shaped"),
])  # fmt: skip
def test_bad_input_is_refused_in_words(changed, words):
    arguments = {"logits": np.zeros((3, 4)), "k": 2, "capacity": 2} | changed
    with pytest.raises(ValueError, match=words):
        batch_priority.route(**arguments)
    tensors = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in arguments.items()}
    tensors |= {"order": tensors.pop("score")} if "score" in tensors else {}
    with pytest.raises(ValueError, match=words):
        batch_priority.prioritised(**tensors)


@given(SIZES, RENORMALISE, SEEDS, st.sampled_from(["max", "sum"]))
def test_the_twin_routes_like_the_reference(sizes, renormalise, seed, score):
    """Every token comes twice, so that there are ties."""
    (tokens, experts, k), rng = sizes, np.random.default_rng(seed)
    assume(experts > k or score == "max")  # all gates sum to 1, and then rounding decides
    logits, noise = rng.normal(size=(2, tokens, experts)).repeat(2, axis=1)
    wanted = batch_priority.route(logits, k, 2, renormalise, noise, score)
    found = batch_priority.prioritised(torch.from_numpy(logits), k, 2, renormalise, torch.from_numpy(noise), score)
    assert_routes_alike(found[:4], wanted, experts)
    assert found.slot.dtype == found.load.dtype == torch.int64 and found.capacity == 2


@given(SIZES, RENORMALISE, SEEDS)
def test_other_orders_differ_in_who_is_served_only(sizes, renormalise, seed):
    tokens, experts, k = sizes
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(tokens, experts)))
    stand = routing.routed(logits, k, 2, renormalise)
    for order in ("max", "sum", "arrival", "random"):
        found, again = (batch_priority.prioritised(logits, k, 2, renormalise, None, order, 7) for _ in range(2))
        assert torch.equal(found.expert, stand.expert) and torch.equal(found.load, stand.load)
        assert found.kept.sum() == stand.kept.sum() and torch.equal(found.slot, again.slot)
        assert order != "arrival" or torch.equal(found.slot, stand.slot)


@pytest.mark.parametrize("renormalise", ["never", "before", "after"])
def test_the_gradient_reaches_the_logits_through_the_weights(renormalise):
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: batch_priority.prioritised(x, 2, 2, renormalise).weight, logits)


@given(SIZES, SEEDS)
def test_a_gate_is_charged_for_importance_and_in_training_for_load(sizes, seed):
    tokens, experts, k = sizes
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(tokens, experts))).requires_grad_()
    gate = PriorityGate(k, noise=2.0, importance=2.0, load=3.0)
    importance = 2 * batch_priority.importance_loss(logits.detach().softmax(1).numpy())
    torch.manual_seed(seed % 1000)
    decided = gate(logits, True)
    load = 3 * batch_priority.load_loss(logits.detach().numpy(), decided.noisy.detach().numpy(), k, 2 / experts)
    charged, quiet = gate.penalty(logits, decided), gate.penalty(logits, gate(logits))
    found = torch.stack((charged, quiet)).detach()
    np.testing.assert_allclose(found, [importance + load, importance], rtol=1e-9, atol=1e-12)
    charged.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_a_gate_rounds_its_capacity_up_to_a_multiple_of_four():
    assert [PriorityGate(2, factor)(torch.zeros(33, 8)).capacity for factor in (0.1, 0.5, 1.0)] == [4, 8, 12]


def test_a_gate_in_a_model_trains_and_its_quality_is_measured():
    config = Config(vocab_size=31, dim=16, hidden_dim=24, layers=2, heads=2, context=16)
    gate = PriorityGate(2, 1.0, noise=1.0, importance=0.1, load=0.1)
    torch.manual_seed(0)
    model = Transformer(config, feed_forward=moe_lab.Mixture(gate, 4, share=2))
    tokens = torch.arange(64).view(4, 16) * 7 % 31
    moe_lab.text_and_penalties(model.train(), tokens).backward()
    router = model.blocks[0].get_submodule("feed_forward").get_submodule("router")
    assert router.weight.grad.abs().sum() > 0
    perplexity, mass = batch_priority.quality(model.eval(), PriorityGate(2, 4.0), tokens, batch=2)
    assert mass == 1 and perplexity == pytest.approx(evaluate.perplexity(model, tokens, 2))
    rows = batch_priority.sweep(model, tokens, factors=(0.25, 4.0))
    assert rows.shape == (3, 2, 2) and (rows[:, 0, 1] < 1).all() and (rows[:, 1, 1] == 1).all()
    np.testing.assert_array_equal(rows[:, 1, 0], rows[0, 1, 0])  # nobody is dropped: the order is nothing
    assert batch_priority.draw(rows, (0.25, 4.0)).axes
