"""Opening a model: names, replacement, recorded inputs, and outliers that leave the function as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minitfm import surgery
from minitfm.model import causal_attention
from tests.minitfm.models import tiny_model, tokens


def run_order(model):
    """Names of the blocks' linear layers as a forward pass reaches them."""
    reached, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: reached.append(name)))
    model(tokens(1, 3))
    for hook in hooks:
        hook.remove()
    return reached


@pytest.mark.parametrize(("activation", "count"), [("swiglu", 14), ("relu", 12)])
def test_linears_are_named_in_execution_order(activation, count):
    model = tiny_model(activation=activation)
    named = surgery.linears(model)
    assert list(named) == run_order(model)
    assert len(named) == count
    assert all(model.get_submodule(name) is module for name, module in named.items())


def test_replace_puts_a_module_in_place_and_returns_the_old_one():
    model = tiny_model()
    name = "blocks.1.feed_forward.down_proj"
    old, new = model.get_submodule(name), nn.Linear(24, 16, bias=False)
    before = model(tokens(1, 4))
    assert surgery.replace(model, name, new) is old
    assert model.get_submodule(name) is new
    assert not torch.allclose(model(tokens(1, 4)), before)
    surgery.replace(model, name, old)
    assert torch.equal(model(tokens(1, 4)), before)


@pytest.mark.parametrize("name", ["blocks.9.attention", "nothing", "blocks.0.attention.nothing"])
def test_replace_knows_its_submodules(name):
    with pytest.raises(KeyError, match=name):
        surgery.replace(tiny_model(), name, nn.Identity())


class Doubled(nn.Module):
    """An attention with a parameter."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, q, k, v):
        return self.factor * causal_attention(q, k, v)


def test_a_layer_can_get_an_attention_of_its_own_and_lose_it_again():
    model = tiny_model()
    before, names = model(tokens(1, 4)), set(model.state_dict())
    module = Doubled()
    assert surgery.set_attend(model, 1, module) is causal_attention
    assert set(model.state_dict()) - names == {"blocks.1.attention.attend.factor"}
    assert not torch.allclose(model(tokens(1, 4)), before)
    assert surgery.set_attend(model, 1, causal_attention) is module
    assert set(model.state_dict()) == names and torch.equal(model(tokens(1, 4)), before)


@given(count=st.integers(1, 5), batch=st.integers(1, 6))
def test_recorded_inputs_are_what_hooks_see(count, batch):
    model, sequences = tiny_model(), tokens(count, 6)
    names = list(surgery.linears(model))
    seen = {name: [] for name in names}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()))
        for name, module in surgery.linears(model).items()
    ]
    for rows in sequences.split(batch):
        model(rows)
    for hook in hooks:
        hook.remove()
    recorded = {name: [] for name in names}
    for name, inputs in surgery.record_inputs(model, sequences, names, batch):
        recorded[name].append(inputs)
    for name in names:
        assert torch.equal(torch.cat(recorded[name]), torch.cat(seen[name]))


def test_recording_streams_one_batch_at_a_time_and_leaves_no_hook():
    model = tiny_model()
    runs = []
    counter = model.register_forward_pre_hook(lambda *_: runs.append(1))
    stream = surgery.record_inputs(model, tokens(3, 4), ["blocks.0.attention.q_proj", "blocks.1"], batch=1)
    reached = [(name, tuple(inputs.shape), len(runs)) for name, inputs in stream]
    counter.remove()
    assert reached == [
        (name, (1, 4, 16), run) for run in (1, 2, 3) for name in ("blocks.0.attention.q_proj", "blocks.1")
    ]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_comes_after_the_last_recorded_layer_is_not_computed():
    model = tiny_model()
    reached = []
    for name in ("blocks.0.attention.k_proj", "blocks.0.attention.o_proj", "blocks.1"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: reached.append(name))
    names = [name for name, _ in surgery.record_inputs(model, tokens(1, 4), ["blocks.0.attention.o_proj"])]
    assert names == ["blocks.0.attention.o_proj"] and reached == ["blocks.0.attention.k_proj"]


def test_recording_refuses_what_it_cannot_record():
    with pytest.raises(KeyError, match=r"blocks\.7"):
        list(surgery.record_inputs(tiny_model(), tokens(1, 4), ["blocks.7"]))
    for empty in (torch.zeros(0, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="non-empty"):
            list(surgery.record_inputs(tiny_model(), empty, ["blocks.0"]))


@given(channels=st.integers(1, 16), power=st.integers(-6, 8), seed=st.integers(0, 99))
def test_planted_outliers_of_a_power_of_two_change_no_bit_of_the_weights_product(channels, power, seed):
    model, planted = tiny_model(), tiny_model()
    chosen = surgery.plant_outliers(planted, channels, 2.0**power, seed)
    assert len(set(chosen)) == channels
    for norm, readers in surgery.norm_readers(model).items():
        gain, new_gain = model.get_submodule(norm).weight, planted.get_submodule(norm).weight
        scale = torch.ones(16)
        scale[chosen] = 2.0**power
        assert torch.equal(new_gain, gain * scale)
        for name in readers:
            old, new = model.get_submodule(name).weight, planted.get_submodule(name).weight
            assert torch.equal(new * new_gain, old * gain)
    with torch.no_grad():
        torch.testing.assert_close(planted(tokens(2, 8)), model(tokens(2, 8)), rtol=1e-5, atol=1e-5)


def test_planted_outliers_reach_every_reader_of_every_norm():
    for activation, readers in (("swiglu", 5), ("relu", 4)):
        model = tiny_model(activation=activation)
        before = maxima(model)
        chosen = surgery.plant_outliers(model, 2, 64.0)
        after = maxima(model)
        grown = {name for name in after if torch.allclose(after[name][chosen], 64 * before[name][chosen], rtol=1e-4)}
        assert len(grown) == 2 * readers
        assert grown == {name for names in surgery.norm_readers(model).values() for name in names}


def maxima(model):
    """Largest input magnitude of each linear layer by channel."""
    names = list(surgery.linears(model))
    return {name: x.abs().amax((0, 1)) for name, x in surgery.record_inputs(model, tokens(2, 8), names)}


@pytest.mark.parametrize(("channels", "factor"), [(0, 2.0), (17, 2.0), (3, 0.0), (3, -1.0), (3, float("nan"))])
def test_impossible_outliers_are_refused(channels, factor):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="1 <= channels <= 16 and factor > 0"):
        surgery.plant_outliers(model, channels, factor)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
