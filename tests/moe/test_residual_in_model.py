"""PR-MoE in the model: the twin of the mix, DeepSpeed's own layer, the pyramid, and what the claim says of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from chapters.moe import residual
from chapters.moe.routing import Gate
from chapters.shared import moe_lab
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, tolerance
from tests.moe.mixes import ARGUMENTS, SEEDS, deepspeed, drawn


@given(ARGUMENTS, SEEDS)
def test_the_twin_mixes_like_the_reference_and_so_do_its_gradients(given_, seed):
    parts = {name: torch.from_numpy(part) for name, part in given_.items()}
    learned = [part.requires_grad_() for name, part in parts.items() if name != "source"]
    dy, room = np.random.default_rng(seed).normal(size=given_["x"].shape), tolerance(np.float64, 600, 20)
    y = residual.mixed(**parts)
    np.testing.assert_allclose(y.detach(), residual.mix(**given_), **room)
    found = torch.autograd.grad((y * torch.from_numpy(dy)).sum(), learned)
    for mine, wanted in zip(found, residual.mix_backward(dy, **given_), strict=True):
        np.testing.assert_allclose(mine, wanted, **room)


def test_golden_module_of_deepspeed():
    arrays, _ = deepspeed()

    def linear(name: str) -> nn.Linear:
        held = {part: arrays[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in arrays}
        made = nn.Linear(*held["weight"].shape[::-1], bias="bias" in held)
        made.load_state_dict({part: torch.from_numpy(values) for part, values in held.items()})
        return made

    mlp, *experts = (nn.Sequential(linear(f"{name}.a"), nn.ReLU(), linear(f"{name}.b"))
                     for name in ("mlp", *(f"expert{e}" for e in range(4))))  # fmt: skip
    layer = residual.Residual(mlp, experts, linear("gate"), linear("coefficient"), Gate(1, None))
    x = torch.from_numpy(arrays["x"])
    with torch.no_grad():
        found, logits = layer(x), layer.router(x.flatten(0, 1))
    np.testing.assert_allclose(found, arrays["y"], **tolerance(np.float32, 32))
    balance = Gate(1, balance=1.0, z=0.0).penalty(logits, layer.routing)
    np.testing.assert_allclose(balance, arrays["l_aux"], **tolerance(np.float32))


CONFIG = Config(vocab_size=31, dim=16, hidden_dim=24, layers=4, heads=2, context=16)


def small(policy: moe_lab.Policy, experts: tuple[int, ...] = (2, 3)) -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG, feed_forward=residual.Pyramid(policy, experts))


@pytest.mark.parametrize(("experts", "layers"), [((3,), [3] * 4), ((2, 5), [2, 2, 5, 5]), ((1, 2, 3, 4), [1, 2, 3, 4]),
                                                 ((1, 2, 3), [1, 1, 2, 3])])  # fmt: skip
def test_a_pyramid_gives_each_layer_its_experts(experts, layers):
    model = small(Gate(1), experts)
    assert [len(block.get_submodule("feed_forward.experts")) for block in model.blocks] == layers
    one = 3 * 16 * 12
    assert residual.sizes(model) == (one * (4 + sum(layers)), one * 8)
    dense = Transformer(CONFIG, feed_forward=moe_lab.Mixture(Gate(2), 5, share=2))
    assert residual.sizes(dense) == (one * 20, one * 8)


@pytest.mark.parametrize("experts", [(), (0, 3), (1, 2, 3, 4, 5)])
def test_a_pyramid_that_fits_no_model_is_refused(experts):
    with pytest.raises(ValueError, match="experts must be 1 to 4 numbers"):
        small(Gate(1), experts)


def test_a_layer_of_two_choices_is_refused():
    with pytest.raises(ValueError, match="k = 2"):
        small(Gate(2))(torch.zeros(1, 4, dtype=torch.long))


def test_every_part_of_a_model_learns_and_shares_are_told_by_layer():
    model, tokens = small(Gate(1, 0.5)).train(), torch.arange(32).view(2, 16) % 31
    moe_lab.text_and_penalties(model, tokens).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None or "experts" in name, name
        assert "coefficient" not in name or weight.grad.abs().sum() > 0
    found = residual.expert_shares(model.eval(), tokens)
    assert len(found) == 4 and all(0 < share < 1 and 0 <= dropped < 1 for share, dropped in found)
    assert max(dropped for _, dropped in found) >= 0.5 - 1e-9


def test_where_all_are_dropped_the_fixed_layer_answers():
    torch.manual_seed(0)
    layer, x = residual.Pyramid(Gate(1), (3,))(CONFIG, 0), torch.randn(2, 3, 16)
    with torch.no_grad():
        layer(x)
        nobody = layer.routing._replace(slot=torch.full((6, 1), 99), weight=torch.zeros(6, 1))
        layer.policy = Always(nobody)
        fixed = layer.coefficient(x).softmax(-1)[..., 1:] * layer.mlp(x)
        torch.testing.assert_close(layer(x), fixed)


def test_the_sentence_says_whether_the_pyramid_was_reproduced():
    assert residual.turned({"pyramid": [1.0]}) == ""
    both = {"pyramid": [1.0, 2.0], "upside down": [1.5, 3.0]}
    assert residual.turned(both).endswith("2 of 2 runs, is reproduced")
    assert residual.turned(both | {"pyramid": [1.0, 3.0]}).endswith("1 of 2 runs, is not reproduced")


class Always:
    """A policy that decides what it was told."""

    def __init__(self, decision):
        self.decision = decision

    def __call__(self, logits, training):
        return self.decision

    def penalty(self, logits, routing):
        return logits.sum()


@pytest.mark.kernel
def test_autograd_takes_both_kernels():
    """As on a GPU: the same result and gradients as by torch operators."""
    made = [torch.from_numpy(part).to(DEVICE) for part in drawn(5, 17, 3, dtype=np.float32).values()]
    results = []
    for function in (residual.Mix.apply, residual.mixed):
        learned = [part.detach().clone().requires_grad_(part.is_floating_point()) for part in made]
        y = function(*learned)
        y.square().sum().backward()
        results.append([y.detach(), *(part.grad for part in learned if part.is_floating_point())])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, **tolerance(torch.float32, 17, 10))
