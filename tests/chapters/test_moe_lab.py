"""The lab of the mixtures: upcycling, the loop over experts, training once for a setting, and counting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from chapters import lab
from chapters.shared import moe_lab, small_models
from chapters.shared.moe_lab import Mixture, MoE
from minitfm import train
from minitfm.model import FeedForward, dense_feed_forward
from tests.conftest import tolerance


class Told(NamedTuple):
    """A routing for tests: as the token's first logit says, with room for `capacity` at each expert."""

    expert: Tensor
    weight: Tensor
    kept: Tensor
    load: Tensor


@dataclass(frozen=True)
class Tell:
    """A policy that sends every token to the experts of its largest logits, each with half the weight."""

    k: int = 2
    factor: float = 1.0
    keep: bool = True

    def __call__(self, logits: Tensor, training: bool) -> Told:
        expert = logits.topk(self.k).indices
        kept = torch.full(expert.shape, self.keep)
        weight = kept / self.k + 0 * logits.sum(1, keepdim=True)
        return Told(expert, weight, kept, torch.bincount(expert.flatten(), minlength=logits.shape[1]))

    def penalty(self, logits: Tensor, routing: Told) -> Tensor:
        return logits.square().mean()


@pytest.fixture
def small(monkeypatch, tmp_path) -> lab.Lab:
    """The base model, and random text, so that none is read; what is trained is kept in a folder of the test."""
    monkeypatch.setattr(small_models, "cache_folder", lambda: tmp_path)
    made = lab.Lab()
    made.streams = torch.randint(2048, (2, 3000), generator=torch.Generator().manual_seed(0)).unbind()
    return made


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@torch.no_grad()
def test_an_upcycled_model_whose_weights_sum_to_one_computes_what_the_dense_one_does(small):
    tokens = small.validation[:2, :20]
    model = moe_lab.upcycle(small, Mixture(Tell(), 4))
    torch.testing.assert_close(model(tokens), small.model()(tokens), rtol=0, atol=1e-3)
    assert not model.training and len([m for m in model.modules() if isinstance(m, FeedForward)]) == 16
    other = moe_lab.upcycle(small, Mixture(Tell(), 4), seed=1)
    assert not same(model, other) and same(model, moe_lab.upcycle(small, Mixture(Tell(), 4)))


@torch.no_grad()
def test_what_all_experts_dropped_is_zero_and_the_rest_is_the_weighted_sum(small):
    torch.manual_seed(0)
    layer = moe_lab.MoE([torch.nn.Linear(6, 6) for _ in range(3)], torch.nn.Linear(6, 3), Tell())
    x = torch.randn(2, 5, 6)
    out = layer(x)
    for row, found, chosen in zip(x.flatten(0, 1), out.flatten(0, 1), layer.routing.expert, strict=True):
        wanted = (layer.experts[chosen[0]](row) + layer.experts[chosen[1]](row)) / 2
        torch.testing.assert_close(found, wanted, **tolerance(torch.float32, 6))
    layer.policy = Tell(keep=False)
    assert (layer(x) == 0).all()


def test_a_setting_is_trained_once_and_is_told_apart_from_others(small, tmp_path):
    mixture, steps = Mixture(Tell(), 2), []
    first = moe_lab.fresh(small, mixture, 2, progress=steps.append)
    again = moe_lab.fresh(small, mixture, 2, progress=steps.append)
    assert len(steps) == 2 and same(first, again) and first is not again and not first.training
    small.kept.clear()
    assert same(first, moe_lab.fresh(small, mixture, 2, progress=steps.append)) and len(steps) == 2
    assert len(list(tmp_path.iterdir())) == 1
    for other in ({"seed": 1}, {"rate": 1e-2}, {"steps": 3}, {"feed_forward": Mixture(Tell(1), 2)}):
        moe_lab.fresh(small, **({"feed_forward": mixture, "steps": 2} | other))
    assert len(list(tmp_path.iterdir())) == 5
    moe_lab.fresh(small, dense_feed_forward, 1)
    assert same(moe_lab.fresh(small, mixture, 0), moe_lab.fresh(small, mixture, 0))


def test_a_damaged_file_is_made_again(small, tmp_path):
    first = moe_lab.fresh(small, Mixture(Tell(), 2), 1)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    small.kept.clear()
    assert same(first, moe_lab.fresh(small, Mixture(Tell(), 2), 1))


def test_the_loss_is_that_of_the_text_and_the_penalties_of_all_layers(small):
    model = moe_lab.upcycle(small, Mixture(Tell(), 2))
    tokens = small.train_stream[:34].view(2, 17)
    total = moe_lab.text_and_penalties(model, tokens)
    charged = sum(m.penalty.item() for m in model.modules() if isinstance(m, MoE) and m.penalty is not None)
    assert charged > 0
    assert total.item() == pytest.approx(train.next_token_loss(model, tokens).item() + charged)


def test_choices_are_counted_by_layer_and_expert(small):
    model = moe_lab.upcycle(small, Mixture(Tell(), 4))
    found = moe_lab.measure(model, small.validation[:3, :11], batch=2)
    assert found.load.shape == (4, 4) and (found.load.sum(1) == 3 * 10 * 2).all()
    assert torch.equal(found.load, found.kept) and (found.dropped == 0).all() and (found.unserved == 0).all()
    assert ((found.imbalance >= 1) & (found.imbalance <= 2)).all()
    found = moe_lab.measure(moe_lab.set_policy(model, Tell(keep=False)), small.validation[:3, :11])
    assert (found.dropped == 1).all() and (found.unserved == 1).all()
    with pytest.raises(ValueError, match="no MoE layer"):
        moe_lab.measure(small.model(), small.validation[:1])


def test_a_figure_puts_the_policy_back(small):
    model = moe_lab.upcycle(small, Mixture(Tell(), 4))
    drawn = moe_lab.draw({"one": model, "other": model}, small.validation[:1, :9])
    assert [axes.get_title() for axes in drawn.axes] == ["load, mean over layers", "dropped"]
    assert next(m.policy for m in model.modules() if isinstance(m, MoE)) == Tell()
