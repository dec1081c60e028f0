"""Top-KAST in the model: the layer and its optimizer, training, `run`, the claim, and what is refused."""

from __future__ import annotations

import argparse
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.shared import equal_weights, subset_layers
from chapters.shared.memory import peak_bytes
from chapters.shared.pruned_layers import dropped
from chapters.shared.subset_layers import SubsetLinear, SubsetOptimizer
from chapters.sparsity import top_kast
from minitfm import surgery, train
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import golden, oracle, tolerance
from tests.sparsity.drawn import CONTENTS, SEEDS, contents

STREAM = torch.arange(300) % 50
FEW = settings(max_examples=10)
CONFIG = Config(vocab_size=50, dim=12, hidden_dim=20, layers=2, heads=2, context=16)
SETTINGS = train.Settings(6, 2, 9, "adamw", learning_rate=0.01, weight_decay=0.1)
WEIGHTS = 2 * (4 * 12 * 12 + 3 * 12 * 20)


@pytest.fixture
def model() -> Transformer:
    return equal_weights.fresh(CONFIG, 0).eval()


def layer_of(weight: np.ndarray, forward: int, backward: int, bias: np.ndarray | None = None) -> SubsetLinear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight.data = torch.from_numpy(weight)
    if bias is not None:
        linear.bias.data = torch.from_numpy(bias)
    return SubsetLinear(linear, forward, backward, top_kast.chosen_sets)


# --- the layer and its optimizer ------------------------------------------------------------------------------------


def test_golden_forward_and_gradient():
    arrays = golden("sparse/top_kast")
    layer = layer_of(arrays["topkast_W"], 40, 100, arrays["topkast_bias"])
    y = layer(torch.from_numpy(arrays["topkast_x"]))
    np.testing.assert_allclose(y.detach().numpy(), arrays["topkast_forward"], **tolerance(np.float32, 20))
    loss = (y - torch.from_numpy(arrays["topkast_y_target"])).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["topkast_mse"]), rel=1e-5)
    dense = np.zeros(200, np.float32)
    dense[layer.index.numpy()] = layer.values.grad.numpy()
    np.testing.assert_allclose(dense.reshape(10, 20), arrays["topkast_mse_grad_on_B"], **tolerance(np.float32, 7))


@FEW
@given(st.sampled_from([1, 7, 32, 33, 70]), st.sampled_from([1, 5, 17]), SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_gradients_are_those_of_the_masked_product_and_nothing_else_has_one(rows, columns, seed, first, second):
    weight = contents("ties", (rows, columns), seed)
    forward, backward = sorted(1 + round(share * (weight.size - 1)) for share in (first, second))
    layer = layer_of(weight, forward, backward)
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, columns))).requires_grad_()
    y = layer(x)
    grad_out = torch.cos(y.detach())
    y.backward(grad_out)
    masked = torch.from_numpy(np.where(top_kast.choose_sets(weight, forward, backward) == 2, weight, 0))
    torch.testing.assert_close(y, x @ masked.t())
    torch.testing.assert_close(x.grad, grad_out @ masked)
    dense = grad_out.flatten(0, 1).t() @ x.detach().flatten(0, 1)
    torch.testing.assert_close(layer.values.grad, dense.flatten()[layer.index.long()])
    by_definition = subset_layers.gathered(x.detach().flatten(0, 1), grad_out.flatten(0, 1), layer.index)
    torch.testing.assert_close(layer.values.grad, by_definition)
    assert [name for name, _ in layer.named_parameters()] == ["values"] and layer.values.shape == (backward,)


def test_the_backward_pass_holds_no_dense_gradient():
    """Beside what both passes need, the temporary expanded weight, a tile is all that is there at once."""
    rows, columns = 1024, 64
    layer = layer_of(np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32), 1000, 2000)
    x = torch.ones(2, columns)  # without a gradient: the backward pass expands nothing
    y = layer(x).sum()
    held = peak_bytes(y.backward)
    tile = 4 * subset_layers.TILE_ROWS * columns
    assert 4 * 2000 <= held < 4 * (2000 + 2 * rows) + 4 * tile < rows * columns * 4 / 3


def test_the_optimizer_updates_as_the_reference_and_keeps_state_for_b(model):
    layer = layer_of(np.random.default_rng(0).normal(size=(6, 5)), 7, 16)
    optimizer = SubsetOptimizer([layer], top_kast.update_in_place, 0.01, 0.3)
    values, moments = layer.values.detach().numpy().copy(), np.zeros((2, 16))
    for step in range(1, 4):
        gradient = np.random.default_rng(step).normal(size=16)
        layer.values.grad = torch.from_numpy(gradient)
        optimizer.step()
        active, density = layer.active.numpy(), 7 / 30
        values, *moments = top_kast.sparse_update(values, gradient, active, *moments, step, 0.01, 0.3, density)
    state = optimizer.state[layer.values]
    for mine, expected in zip((layer.values.detach(), state["mean"], state["square"]), (values, *moments), strict=True):
        np.testing.assert_allclose(mine.numpy(), expected, **tolerance(np.float64))
    layer.values.grad = None
    with pytest.raises(ValueError, match="no part in the loss"):
        optimizer.step()


def test_half_precision_weights_have_moments_of_float32():
    layer = layer_of(np.ones((2, 3), np.float16), 2, 4)
    optimizer = SubsetOptimizer([layer], top_kast.update_in_place, 0.5, 0.0)
    layer.values.grad = torch.full((4,), 1e-3, dtype=torch.float16)
    optimizer.step()
    state = optimizer.state[layer.values]
    assert state["square"].dtype == torch.float32 and (state["square"] > 0).all()
    assert layer.values.dtype == torch.float16 and layer.values.tolist() == [0.5] * 4


@FEW
@given(st.sampled_from(CONTENTS), SEEDS, st.integers(1, 35), st.integers(1, 35), st.integers(1, 35))
def test_refresh_of_the_layer_is_that_of_the_reference(kind, seed, forward, backward, again):
    forward, backward, again = forward, max(forward, backward), max(forward, again)
    theta, generator = contents(kind, (5, 7), seed), np.random.default_rng(seed)
    layer = layer_of(theta, forward, backward)
    optimizer = SubsetOptimizer([layer], top_kast.update_in_place, 0.01, 0.0)
    values, moments = generator.normal(size=backward), generator.normal(size=(2, backward))
    before = set(layer.index[layer.active].tolist())
    layer.values.data = torch.from_numpy(values.copy())
    optimizer.state[layer.values] |= {"mean": torch.from_numpy(moments[0]), "square": torch.from_numpy(moments[1])}
    index = layer.index.long().numpy()
    new = optimizer.refresh({layer: again})
    expected = top_kast.refresh(
        theta, index, values, moments, lambda theta: top_kast.choose_sets(theta, forward, again)
    )
    state = optimizer.state[layer.values]
    found = layer.theta, layer.index, layer.values.detach(), layer.active, torch.stack([state["mean"], state["square"]])
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs)
    assert new == len(set(layer.index[layer.active].tolist()) - before) / forward


# --- training -------------------------------------------------------------------------------------------------------


def test_where_everything_is_in_a_training_is_dense_training(model):
    dense = copy.deepcopy(model)
    train.train(dense, STREAM, SETTINGS)
    changes = top_kast.train_top_kast(model, STREAM, SETTINGS, top_kast.Plan(0.0, every=2, decay=0.1))
    assert [share for _, share in changes] == [0] * len(changes)
    for (name, mine), theirs in zip(model.state_dict().items(), dense.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_refreshes_come_on_time_until_exploration_stops(model):
    steps = train.Settings(11, 2, 9, "adamw", learning_rate=0.05)
    for plan, expected in (
        (top_kast.Plan(0.8, every=2, stop=0.64), [2, 4, 6, 7]),
        (top_kast.Plan(0.8, every=3, stop=1.0), [3, 6, 9, 11]),
        (top_kast.Plan(0.8, every=3, stop=0.0), []),
    ):
        trained = copy.deepcopy(model)
        changes = top_kast.train_top_kast(trained, STREAM, steps, plan)
        assert [step for step, _ in changes] == expected
        assert any(share > 0 for _, share in changes) == (plan.stop > 0)
        for name, layer in surgery.linears(trained).items():
            assert int((layer.weight != 0).sum()) == layer.weight.numel() - dropped(layer.weight.numel(), 0.8), name


def test_weights_outside_b_stand_still_and_b_shrinks_at_the_stop(model):
    plan = top_kast.Plan(0.75, extra=0.25)
    layers = top_kast.prepare(model, plan)
    first = [(layer.theta.clone(), set(layer.index.tolist())) for layer in layers]
    optimizers = top_kast.optimizers(model, layers, 0.01, 0.1)
    assert sum(len(group["params"]) for group in optimizers[1].param_groups) == 6  # norms and the embedding
    train.train(model, STREAM, SETTINGS, optimizers=lambda model, settings: optimizers)
    optimizers[0].refresh({layer: layer.kept for layer in layers})
    for layer, (theta, inside) in zip(layers, first, strict=True):
        outside = [place for place in range(theta.numel()) if place not in inside]
        assert torch.equal(layer.theta.flatten()[outside], theta.flatten()[outside])
        assert (layer.theta.flatten()[sorted(inside)] != theta.flatten()[sorted(inside)]).all()
        assert len(layer.values) == layer.kept == len(optimizers[0].state[layer.values]["mean"]) and layer.active.all()


@pytest.mark.parametrize(("extra", "share"), [(0.0, 0.25), (0.25, 0.5), (0.75, 1.0)])
def test_gradients_and_moments_grow_with_b(model, extra, share):
    layers = top_kast.prepare(model, top_kast.Plan(0.75, extra))
    sparse, _ = top_kast.optimizers(model, layers, 0.01, 0.1)
    train.next_token_loss(model, STREAM[None, :9]).backward()
    sparse.step()
    assert subset_layers.kept_bytes(model, sparse) == 12 * share * WEIGHTS


def test_dense_training_keeps_twelve_bytes_for_each_weight(model):
    optimizer = torch.optim.AdamW(model.parameters())
    train.next_token_loss(model, STREAM[None, :9]).backward()
    optimizer.step()
    assert subset_layers.kept_bytes(model, optimizer) == 12 * WEIGHTS


@pytest.mark.parametrize(
    "wrong", [{"sparsity": 1.0}, {"extra": -0.1}, {"extra": 1.1}, {"every": 0}, {"decay": -1.0}, {"stop": 2.0}]
)
def test_plans_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        top_kast.Plan(**{"sparsity": 0.5, **wrong})


def test_weights_that_are_not_finite_are_refused_by_name(model):
    model.blocks[1].attention.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.v_proj\.weight must be finite"):
        top_kast.prepare(model, top_kast.Plan(0.5))


@pytest.mark.parametrize(
    ("function", "given_", "words"),
    [
        ("choose_sets", (np.ones(4), 3, 2), "<= 4 weights, got 3 and 2"),
        ("choose_sets", (np.array([1, np.nan]), 1, 2), "NaN"),
        ("exploration_penalty", (np.ones(2), np.ones(2, bool), 0.0), r"\(0, 1\], got 0.0"),
        ("exploration_penalty", (np.ones(3), np.ones(2, bool), 0.5), r"\(2,\), got shape \(3,\)"),
        ("sparse_update", (*[np.ones(2)] * 5, 0, 0.1, 0.1, 0.5), "step=0"),
        ("refresh", (np.ones(2), np.array([2]), np.ones(1), np.ones((1, 1)), None), "within 2 weights"),
    ],
)
def test_the_reference_names_the_fault(function, given_, words):
    with pytest.raises(ValueError, match=words):
        getattr(oracle("sparsity.top_kast"), function)(*given_)


# --- models of equally many weights ---------------------------------------------------------------------------------


def test_rivals_hold_as_many_weights():
    large = equal_weights.half(Config(vocab_size=50, dim=128, hidden_dim=384, layers=4, heads=4))
    count = equal_weights.block_weights(large)
    assert large.dim == 64 and large.head_dim == 16
    assert [equal_weights.block_weights(f(large)) * 4 for f in (equal_weights.narrow, equal_weights.shallow)] == [
        count
    ] * 2
    odd = equal_weights.narrow(Config(vocab_size=50, dim=24, heads=6, kv_heads=2, head_dim=4))
    assert odd.heads % odd.kv_heads == 0


@pytest.mark.parametrize("kind", equal_weights.STATIC)
def test_static_masks_stay_and_have_their_count(kind, model):
    lab = SimpleNamespace(config=CONFIG, train_stream=STREAM)
    trained = equal_weights.trained_static(lab, CONFIG, kind, 0.75, 3, 0, 0.1)
    for (name, layer), before in zip(surgery.linears(trained).items(), surgery.linears(model).values(), strict=True):
        kept = layer.weight != 0
        assert int(kept.sum()) == kept.numel() / 4, name
        largest = before.weight.abs()[kept].min() >= before.weight.abs()[~kept].max()
        assert bool(largest) == (kind == equal_weights.STATIC[1])
    with pytest.raises(ValueError, match="kind must be one of"):
        equal_weights.trained_static(lab, CONFIG, "best", 0.75, 3, 0, 0.1)


# --- run and claim --------------------------------------------------------------------------------------------------


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    top_kast.options(parser)
    args = parser.parse_args(words)
    args.seed = 0
    return args


def test_run_trains_on_and_leaves_the_weights_of_a(model):
    report = top_kast.apply(model, STREAM.view(-1, 12), arguments("--sparsity", "0.75", "--steps", "3", "--every", "1"))
    assert report["kept weights"] == f"{WEIGHTS // 4} of {WEIGHTS}"
    assert set(model.state_dict()) == set(Transformer(CONFIG).state_dict())


@pytest.mark.parametrize("wrong", [["--sparsity", "1"], ["--steps", "0"], ["--extra", "2"], ["--every", "0"]])
def test_run_refuses_before_it_trains(model, wrong):
    with pytest.raises(ValueError, match=wrong[0].strip("-")):
        top_kast.apply(model, STREAM.view(-1, 12), arguments(*wrong))


class Bench:
    """As much of a lab as the claim asks for; `costs` are the perplexities that it measures, one after another."""

    full, seeds, config, train_stream = False, (0, 1), CONFIG, STREAM

    def __init__(self, costs: list[float]) -> None:
        self.costs, self.kept = iter(costs), {}

    def once(self, key, compute):
        return self.kept.setdefault(key, compute() if key not in self.kept else None)

    def perplexity(self, model: Transformer) -> float:
        return next(self.costs)


@pytest.mark.parametrize(
    ("random", "narrow", "last", "holds"),
    [(30, 30, 0.01, True), (10, 30, 0.01, False), (30, 20, 0.01, False), (30, 30, 0.05, False)],
)
def test_the_claim_holds_only_if_all_of_it_shows(random, narrow, last, holds, monkeypatch):
    def trained(model, stream, settings, plan):
        return [(1, 0.02), (2, 0.08), *[(3 + i, last) for i in range(4)]]

    monkeypatch.setattr(top_kast, "train_top_kast", trained)
    for name in ("trained_static", "trained_dense"):
        monkeypatch.setattr(equal_weights, name, lambda *_: None)
    claim = top_kast.claim(Bench([20, random, 31, 20, 30, 32, 20, narrow, 33, 20, 30, 34]))
    assert claim.holds is holds and "random mask, 10%" in claim.sentence
    assert claim.numbers["seeds where it is better than random mask, 10%"] == 1 + (random > 20)
    assert claim.numbers["perplexity, Top-KAST, 25%"] == 20
