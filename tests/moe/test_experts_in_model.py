"""A layer of experts as a whole: the reference's definition, published code, its PyTorch twin, and in the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chapters.moe import experts
from chapters.moe.experts import Grouped, GroupedMoE
from chapters.moe.routing import Gate, Routing, route
from chapters.shared import moe_lab
from minitfm.config import Config
from minitfm.model import FeedForward, Transformer
from tests.conftest import golden, tolerance
from tests.moe.lines import SEEDS, SIZES

ACTIVATIONS = st.sampled_from(["swiglu", "relu"])
CONFIG = Config(vocab_size=30, dim=16, hidden_dim=24, layers=2, heads=2, context=16)


def layer(sizes: tuple[int, int, int], activation: str, capacity: int | None, seed: int) -> tuple:
    """x, up, down, and a routing that may drop, in float64."""
    (tokens, count, k), rng = sizes, np.random.default_rng(seed)
    dim, hidden = rng.integers(1, 8, 2)
    up = rng.normal(size=(count, hidden * (2 if activation == "swiglu" else 1), dim))
    routing = route(2 * rng.normal(size=(tokens, count)), k, capacity, "before")
    return rng.normal(size=(tokens, dim)), up, rng.normal(size=(count, dim, hidden)), routing


def as_tensors(routing: Routing) -> Routing:
    """The same routing for the twin."""
    return Routing(*(torch.from_numpy(part) for part in routing[:4]), routing.capacity)


@given(SIZES, ACTIVATIONS, st.sampled_from([None, 1, 3]), SEEDS)
def test_the_layer_is_its_definition(sizes, activation, capacity, seed):
    x, up, down, routing = layer(sizes, activation, capacity, seed)
    found = experts.feed_forward(x, up, down, routing, activation)
    wanted = np.zeros_like(x)
    for t, j in np.ndindex(*routing.expert.shape):
        if routing.kept[t, j]:
            hidden = up[routing.expert[t, j]] @ x[t]
            gate, value = np.split(hidden, 2) if activation == "swiglu" else (hidden, None)
            hidden = np.maximum(gate, 0) if value is None else gate / (1 + np.exp(-gate)) * value
            wanted[t] += routing.weight[t, j] * (down[routing.expert[t, j]] @ hidden)
    near = tolerance(np.float64, 8 * sizes[2], 100)
    np.testing.assert_allclose(found, wanted, **near)
    np.testing.assert_allclose(experts.every_expert(x, up, down, routing, activation), wanted, **near)
    arguments = *map(torch.from_numpy, (x, up, down)), as_tensors(routing)
    np.testing.assert_allclose(experts.fed_forward(*arguments, activation == "swiglu"), wanted, **near)


@given(SIZES, SEEDS)
def test_the_twin_sorts_like_the_reference(sizes, seed):
    *_, routing = layer(sizes, "relu", 2, seed)
    kept = torch.from_numpy(routing.kept)
    found = experts.permuted(torch.from_numpy(routing.expert), kept, sizes[1])
    for mine, wanted in zip(found, experts.permute(routing.expert, routing.kept, sizes[1]), strict=True):
        assert mine.dtype is torch.int64
        np.testing.assert_array_equal(mine, wanted)


def test_an_idle_expert_is_not_read_and_all_dropped_gives_zero():
    x, up, down, routing = layer((7, 4, 2), "swiglu", None, 0)
    up, down = np.append(up, np.full_like(up[:1], np.nan), 0), np.append(down, np.full_like(down[:1], np.nan), 0)
    assert np.isfinite(experts.feed_forward(x, up, down, routing)).all()
    assert np.isnan(experts.every_expert(x, up, down, routing)).all()
    nobody = routing._replace(slot=routing.slot + routing.capacity, weight=np.zeros_like(routing.weight))
    np.testing.assert_array_equal(experts.feed_forward(x, up, down, nobody), 0)
    found = experts.fed_forward(*map(torch.from_numpy, (x, up, down)), as_tensors(nobody))
    np.testing.assert_array_equal(found, 0)


def test_silu_does_not_overflow():
    gate = np.array([[-1e4, 1e4, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(experts.activate(gate), [[0, 1e4, 0, 2 / (1 + np.exp(-2))]], **tolerance(np.float64))


def test_golden_layer_of_deepspeed():
    """Its experts have biases: one more column of ones, which relu keeps."""
    a = {name: array.astype(np.float64) for name, array in golden("sparse/deepspeed_moe_layer").items()}
    x = np.pad(a["x"].reshape(-1, 16), ((0, 0), (0, 1)), constant_values=1)
    up = np.concatenate((a["up"], a["up_bias"][..., None]), axis=2)  # [experts, 32, 17]
    up = np.append(up, np.tile(np.eye(17)[16], (4, 1, 1)), axis=1)  # and a row that passes the ones on
    down = np.concatenate((a["down"], a["down_bias"][..., None]), axis=2)
    found = experts.feed_forward(x, up, down, route(x[:, :16] @ a["router"].T, 1), "relu")
    np.testing.assert_allclose(found, a["y"].reshape(-1, 16), **tolerance(np.float32, 32))


def test_golden_dispatch_and_combination_of_vmoe():
    """Half of the choices are dropped; the experts are linear."""
    a, case = golden("sparse/vmoe_routing"), "k2_bpr1_cf0.5_mult4"
    expert, kept = a[f"{case}__expert"].astype(np.int64), a[f"{case}__slot"] < a[f"{case}__capacity"]
    order, offsets = experts.permute(expert, kept, 8)
    y = experts.grouped_matmul(a["e2e_x"], a["e2e_We"].transpose(0, 2, 1), offsets, order // 2)
    found = experts.combine(y, order, a[f"{case}__combine"] * kept)
    np.testing.assert_allclose(found, a["e2e_y_k2_bpr_cf0.5"], **tolerance(np.float32, 6, 4))


@settings(max_examples=10)
@given(SIZES, ACTIVATIONS, st.sampled_from([None, 2]), SEEDS)
def test_gradients_are_those_of_the_loop(sizes, activation, capacity, seed):
    (tokens, count, k), config = sizes, Config(8, dim=6, hidden_dim=5, heads=1, activation=activation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(k, None if capacity is None else 0.5, "before")
        plain = moe_lab.Mixture(gate, count)(config, 0).double()
        x = torch.randn(1, tokens, 6, dtype=torch.float64)
    assert isinstance(plain, moe_lab.MoE)
    plain.router.float()
    grouped = experts.stacked(plain)
    near = tolerance(torch.float32, 8 * k)  # the router, and so the weights, are float32
    results = []
    for module in (plain, grouped):
        given_ = x.clone().requires_grad_()
        y = module(given_)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        router = next(module.router.parameters()).grad
        results.append([y.detach(), given_.grad, router.clone()])
        module.router.zero_grad()
    for loop, sorted_ in zip(*results, strict=True):
        np.testing.assert_allclose(sorted_, loop, rtol=near["rtol"], atol=near["atol"] * float(loop.abs().max() + 1))
    for name, mine in (("up_proj.weight", grouped.up.grad[:, -5:]), ("down_proj.weight", grouped.down.grad)):
        wanted = torch.stack([gradient(expert.get_parameter(name)) for expert in plain.experts])
        np.testing.assert_allclose(mine, wanted, rtol=near["rtol"], atol=near["atol"] * float(wanted.abs().max() + 1))


def gradient(weight: Tensor) -> Tensor:
    """Zero for an expert that nobody chose."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def test_stacking_a_model_changes_no_logit():
    torch.manual_seed(0)
    model = Transformer(CONFIG, feed_forward=moe_lab.Mixture(Gate(2, 1.0, "after"), 4, share=2)).eval()
    tokens = torch.randint(0, 30, (3, 16))
    with torch.no_grad():
        before = model(tokens)
        for block in model.blocks:
            block.feed_forward = experts.stacked(block.get_submodule("feed_forward"))
        after = model(tokens)
    np.testing.assert_allclose(after, before, **tolerance(np.float32, 24))
    load = moe_lab.measure(model, tokens).load
    assert load.shape == (2, 4) and (load.sum(1) == 2 * 45).all()


def test_only_alike_feed_forward_layers_can_be_stacked():
    router, gate = nn.Linear(16, 2), Gate()
    narrow = Config(30, dim=16, hidden_dim=8, heads=2)
    for parts, words in (
        ([], "FeedForward"), ([nn.Identity(), FeedForward(CONFIG)], "FeedForward"),
        ([FeedForward(CONFIG), FeedForward(narrow)], "one size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            experts.stacked(moe_lab.MoE(parts, router, gate))


@pytest.mark.parametrize(("activation", "columns"), [("swiglu", 24), ("relu", 12)])
def test_the_seam_makes_stacked_layers_that_train(activation, columns):
    torch.manual_seed(0)
    config = Config(30, dim=16, hidden_dim=24, layers=2, heads=2, context=16, activation=activation)
    model = Transformer(config, feed_forward=Grouped(Gate(2, None, "before"), 4, share=2))
    layers = [module for module in model.modules() if isinstance(module, GroupedMoE)]
    assert [tuple(one.up.shape) for one in layers] == [(4, columns, 16)] * 2
    assert all(one.down.shape == (4, 16, 12) for one in layers)
    model(torch.randint(0, 30, (3, 16))).logsumexp(-1).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
    assert abs(layers[0].up.detach().std() * 4 - 1) < 0.1 and layers[0].down.detach().std() < 0.2
    assert repr(Grouped(Gate(2))) != repr(moe_lab.Mixture(Gate(2))) != repr(moe_lab.Mixture(Gate(1)))


def test_a_step_reads_the_experts_that_its_tokens_chose():
    """Four sequences of one token: alone each reads k experts, together they read those that any of them chose."""
    torch.manual_seed(0)
    model = Transformer(CONFIG, feed_forward=Grouped(Gate(2, None, "before"), 4, share=2)).eval()
    tokens = torch.tensor([[3], [3], [7], [11]])
    assert experts.touched(model, tokens, 1) == 2
    model(tokens)
    chosen = [module.routing.expert for module in model.modules() if isinstance(module, GroupedMoE)]
    assert experts.touched(model, tokens, 4) == np.mean([len(one.unique()) for one in chosen])
    pairs = [len(rows.unique()) for one in chosen for rows in one.split(2)]
    assert experts.touched(model, tokens, 2) == np.mean(pairs)
