"""Routing as a whole: its laws, what it refuses, its PyTorch twin, and a gate in a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.moe import routing
from chapters.moe.routing import Gate
from chapters.shared import moe_lab
from minitfm.config import Config
from minitfm.model import FeedForward, Transformer
from tests.conftest import DEVICE, golden, kernel, poisoned, tolerance
from tests.moe.lines import BY, RENORMALISE, SEEDS, SIZES, arrivals, assert_routes_alike, drawn_logits

fast = kernel("moe.routing")
SPREADS = st.sampled_from([0.0, 1.0, 100.0])
BAD = {
    "k > experts": ({"k": 5}, "k must be from 1 to the 4 experts, got 5", "k from 1 to 4"),
    "k = 0": ({"k": 0}, "k must be from 1", "k from 1"),
    "capacity 0": ({"capacity": 0}, "capacity must be at least 1 or None, got 0", "capacity of 1 or more"),
    "NaN": ({"logits": np.full((3, 4), np.nan)}, "finite", "finite"),
    "infinite": ({"logits": np.array([[0.0, np.inf]]), "k": 1}, "finite", "finite"),
    "infinite noise": ({"noise": np.full((3, 4), np.inf)}, "finite", "finite"),
    "other noise": ({"noise": np.zeros((3, 1))}, "noise must be shaped like logits", "noise must be shaped"),
    "no matrix": ({"logits": np.zeros(4)}, "matrix", "matrix"),
    "no tokens": ({"logits": np.zeros((0, 4))}, "non-empty", "non-empty"),
    "other rule": ({"renormalise": "always"}, "renormalise must be", "renormalise is"),
    "other line": ({"by": "tokens"}, 'by must be "choice" or "token"', "by"),
}


@given(SIZES, BY, RENORMALISE, SPREADS, SEEDS)
def test_no_expert_takes_more_than_its_capacity_and_none_drops_while_it_has_room(sizes, by, renormalise, spread, seed):
    tokens, experts, k = sizes
    capacity = int(np.random.default_rng(seed).integers(1, tokens + 1))
    found = routing.route(drawn_logits(tokens, experts, seed, spread).numpy(), k, capacity, renormalise, None, by)
    taken = np.bincount(found.expert[found.kept], minlength=experts)
    np.testing.assert_array_equal(taken, np.minimum(found.load, capacity))
    assert found.load.sum() == tokens * k
    places = set(zip(found.expert[found.kept].tolist(), found.slot[found.kept].tolist(), strict=True))
    assert len(places) == found.kept.sum()
    assert all(len(set(row)) == k for row in found.expert.tolist())
    assert (found.weight[~found.kept] == 0).all() and (found.weight.sum(axis=1) < 1 + 1e-5).all()
    assert found.dropped == pytest.approx(1 - taken.sum() / (tokens * k))


@given(SIZES, RENORMALISE, SPREADS, SEEDS)
def test_without_a_limit_nothing_is_dropped_and_both_renormalisations_agree(sizes, renormalise, spread, seed):
    tokens, experts, k = sizes
    logits = drawn_logits(tokens, experts, seed, spread).double().numpy()
    found = routing.route(logits, k, None, renormalise)
    assert found.kept.all() and found.capacity == tokens and found.dropped == 0
    if renormalise != "never":
        np.testing.assert_allclose(found.weight.sum(axis=1), 1, **tolerance(np.float64, k))
    np.testing.assert_array_equal(found.weight, np.sort(found.weight, axis=1)[:, ::-1])  # best first


@given(SIZES, SEEDS)
def test_noise_is_added_before_anything_is_decided(sizes, seed):
    tokens, experts, k = sizes
    logits, noise = (drawn_logits(tokens, experts, seed + one, 1.0).numpy() for one in (0, 1))
    noisy, added = routing.route(logits, k, 2, "after", noise), routing.route(logits + noise, k, 2, "after")
    for a, b in zip(noisy, added, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    changed, words, twin = BAD[case]
    given_ = {"logits": np.zeros((3, 4)), "k": 2} | changed
    with pytest.raises(ValueError, match=words):
        routing.route(**given_)
    tensors = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in given_.items()}
    with pytest.raises(ValueError, match=twin):
        routing.routed(**tensors)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, 8), "tokens"), ((8, 0), "experts"), ((8, 8, 0), "k must"), ((8, 8, 1, 0.0), "factor"),
     ((8, 8, 1, float("nan")), "factor"), ((8, 8, 1, 1.0, "up"), "rule must be one of round"),
     ((8, 8, 1, 1.0, "ceil", 0), "multiple"), ((8, 8, 1, 1.0, "ceil", 1, 0), "least")],
)  # fmt: skip
def test_a_capacity_of_nothing_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        routing.capacity(*arguments)


@given(SIZES, BY, RENORMALISE, SPREADS, SEEDS, st.booleans())
def test_the_twin_routes_like_the_reference(sizes, by, renormalise, spread, seed, shuffled):
    tokens, experts, k = sizes
    logits, noise = (drawn_logits(tokens, experts, seed + one, spread) for one in (0, 1))
    arrival = arrivals(tokens, seed) if shuffled else None
    wanted = routing.route(logits.numpy(), k, 2, renormalise, noise.numpy(), by, arrival)
    there = None if arrival is None else torch.from_numpy(arrival)
    found = routing.routed(logits, k, 2, renormalise, noise, by, there)
    assert_routes_alike(found[:4], wanted, experts)
    assert found.expert.dtype == found.slot.dtype == found.load.dtype == torch.int64 and found.capacity == 2


@pytest.mark.parametrize("renormalise", ["never", "before", "after"])
def test_the_gradient_reaches_the_logits_through_the_weights(renormalise):
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: routing.routed(x, 2, 2, renormalise).weight, logits)


@given(SIZES, SEEDS)
def test_a_gate_charges_for_imbalance_and_for_large_logits(sizes, seed):
    tokens, experts, k = sizes
    logits = drawn_logits(tokens, experts, seed, 1.0).double()
    decided = routing.routed(logits, k)
    charged = Gate(k, balance=2.0, z=3.0).penalty(logits, decided)
    balance = routing.balance_loss(logits.softmax(1).numpy(), decided.expert.numpy())
    wanted = 2 * balance + 3 * routing.z_loss(logits.numpy())
    np.testing.assert_allclose(charged, wanted, **tolerance(np.float64, tokens, 100))


def test_the_z_loss_is_its_definition_also_where_exp_overflows():
    logits = np.array([[0.0, np.log(3)], [2.0, 2.0]])
    assert routing.z_loss(logits) == pytest.approx((np.log(4) ** 2 + (2 + np.log(2)) ** 2) / 2)
    assert routing.z_loss(np.array([[5000.0, 5000.0]], np.float16)) == pytest.approx((5000 + np.log(2)) ** 2, rel=1e-3)


def test_golden_routes_of_deepspeed_and_vmoe():
    arrays = golden("sparse/deepspeed_moe_routing")
    for name, by in (("top2_nosample_cf0.5_min4", "choice"), ("topk3_position_cf1.0_min4", "token")):
        k, capacity = len(arrays[f"{name}__expert"]), int(arrays[f"{name}__capacity"])
        factor = float(name.split("cf")[1].split("_")[0])
        assert capacity == routing.capacity(64, 8, k, factor, "ceil", least=4)
        found = routing.route(arrays["logits"], k, capacity, "after", None, by)
        np.testing.assert_array_equal(np.where(found.kept, found.expert, -1), arrays[f"{name}__expert"].T)
        np.testing.assert_array_equal(np.where(found.kept, found.slot, 0), arrays[f"{name}__slot"].T)
        np.testing.assert_allclose(found.weight, arrays[f"{name}__gate"].T, **tolerance(np.float32))
        np.testing.assert_array_equal(found.load, arrays[f"{name}__exp_counts"])
    arrays = golden("sparse/vmoe_routing")
    for name, factor in (("k1_bpr0_cf0.25_mult4", 0.25), ("k2_bpr0_cf1.05_mult4", 1.05)):
        k, capacity = arrays[f"{name}__expert"].shape[1], int(arrays[f"{name}__capacity"])
        assert capacity == routing.capacity(64, 8, k, factor, "ceil", multiple=4)
        found = routing.route(arrays["logits"], k, capacity)
        np.testing.assert_array_equal(found.expert, arrays[f"{name}__expert"])
        np.testing.assert_array_equal(found.slot, arrays[f"{name}__slot"])
        np.testing.assert_allclose(found.weight, arrays[f"{name}__combine"] * found.kept, **tolerance(np.float32))


def test_a_random_choice_of_who_stays_keeps_as_many():
    """DeepSpeed's top-1 drops at random; only who is dropped differs."""
    arrays = golden("sparse/deepspeed_moe_routing")
    for name in ("top1_rts_cf0.5_min4", "top1_norts_cf0.5_min4", "top1_rts_cf2.0_min4"):
        found = routing.route(arrays["logits"], 1, int(arrays[f"{name}__capacity"]))
        kept = arrays[f"{name}__expert"][0]
        np.testing.assert_array_equal(np.bincount(kept[kept >= 0], minlength=8), np.minimum(found.load, found.capacity))
        assert (kept[kept >= 0] == found.expert[kept >= 0, 0]).all()


@pytest.mark.kernel
def test_kernel_shows_what_is_not_finite_and_routes_the_rest():
    logits = drawn_logits(20, 5, 3, 1.0)
    sound = logits.clone()
    for token, value in ((3, float("nan")), (7, float("inf")), (19, float("-inf"))):
        logits[token, 2], sound[token] = value, 0
    expert, weight, slot, load = fast.route(poisoned(logits.to(DEVICE)), 2, 3, "after", block=16)
    wanted = routing.route(sound.numpy(), 2, 3, "after")
    wanted.weight[[3, 7, 19]] = np.nan
    assert_routes_alike((expert, weight, slot, load), wanted, 5)


@pytest.mark.kernel
@pytest.mark.parametrize(("changed", "error"), [
    ({"k": 4}, ValueError), ({"k": 0}, ValueError), ({"capacity": 0}, ValueError), ({"by": "all"}, ValueError),
    ({"renormalise": "always"}, ValueError), ({"logits": torch.zeros(3)}, ValueError),
    ({"logits": torch.zeros(3, 300)}, ValueError), ({"logits": torch.zeros(3, 3, dtype=torch.float64)}, TypeError),
    ({"noise": torch.zeros(3, 1)}, ValueError), ({"logits": torch.zeros(3, 6)[:, ::2]}, ValueError),
    ({"arrival": torch.arange(4)}, ValueError), ({"arrival": torch.arange(3, dtype=torch.int32)}, TypeError),
])  # fmt: skip
def test_kernel_refuses_what_it_cannot_serve(changed, error):
    with pytest.raises(error):
        fast.route(**({"logits": torch.zeros(3, 3), "k": 2} | changed))


def test_a_gate_in_a_model_trains_and_its_noise_is_for_training_only():
    config = Config(vocab_size=31, dim=16, hidden_dim=24, layers=2, heads=2, context=16)
    gate = Gate(2, 1.0, "before", noise=8.0)
    torch.manual_seed(0)
    model = Transformer(config, feed_forward=moe_lab.Mixture(gate, 4, share=2))
    tokens = torch.arange(32).view(2, 16) % 31
    moe_lab.text_and_penalties(model.train(), tokens).backward()
    layer = model.blocks[0].get_submodule("feed_forward")
    assert layer.get_submodule("router").weight.grad.abs().sum() > 0
    experts = [module for module in layer.modules() if isinstance(module, FeedForward)]
    assert [expert.up_proj.weight.shape for expert in experts] == [(12, 16)] * 4
    with torch.no_grad():
        noisy = {model(tokens).sum().item() for _ in range(3)}
        quiet = {model.eval()(tokens).sum().item() for _ in range(3)}
    assert len(noisy) == 3 and len(quiet) == 1
