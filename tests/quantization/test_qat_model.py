"""Quantization-aware training in the model: the layer, its gradients, what is trained, what is left, the teacher."""

from __future__ import annotations

import copy
from argparse import Namespace

import numpy as np
import pytest
import torch

from chapters.quantization import qat
from minitfm import evaluate, surgery
from tests.conftest import DEVICE, tolerance
from tests.minitfm.models import tiny_model, tokens

STREAM = tokens(2000)


@pytest.mark.parametrize("groups", [1, 6, 12])
@pytest.mark.parametrize("bits", [2, 4])
def test_autograd_finds_what_the_reference_says(groups, bits):
    rng = np.random.default_rng(groups)
    w, dy = rng.normal(size=(2, 6, 10)).astype(np.float32)
    scale = qat.first_scale(w, bits, groups)
    x, s = (torch.from_numpy(part).to(DEVICE).requires_grad_() for part in (w, scale))
    y = qat.LearnedStep.apply(x, s, bits)
    y.backward(torch.from_numpy(dy).to(DEVICE))
    dx, dscale = qat.lsq_gradient(w, scale, dy, bits)
    np.testing.assert_array_equal(y.detach().cpu(), qat.lsq(w, scale, bits))
    np.testing.assert_array_equal(x.grad.cpu(), dx)
    np.testing.assert_allclose(s.grad.cpu(), dscale, **tolerance(np.float32, w.size // groups, scale=8))


@pytest.mark.parametrize("bits", [3, None])
@pytest.mark.parametrize("size", [None, 5, 10])
def test_a_layer_multiplies_by_rounded_weights_and_trains_the_others(bits, size):
    linear = torch.nn.Linear(10, 4)
    w, groups = linear.weight.numpy(force=True), 40 // (size or 10)
    layer = qat.FakeQuantLinear(linear, bits, size)
    expected = qat.ternary(w, groups) if bits is None else qat.lsq(w, qat.first_scale(w, bits, groups), bits)
    np.testing.assert_allclose(layer.rounded().detach(), expected, **tolerance(np.float32))
    x = torch.randn(3, 10)
    torch.testing.assert_close(layer(x), x @ torch.from_numpy(expected).T + linear.bias)
    layer(x).sum().backward()
    assert set(dict(layer.named_parameters())) == {"weight", "bias"} | ({"scale"} if bits else set())
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_a_step_that_crosses_zero_stays_usable():
    layer = qat.FakeQuantLinear(torch.nn.Linear(8, 2), 4)
    expected = layer.rounded().detach()
    layer.scale.data.neg_()
    torch.testing.assert_close(layer.rounded(), expected)
    layer.scale.data.zero_()
    assert layer.rounded().isfinite().all()


@pytest.mark.parametrize("bits", [2, None])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_model_keeps_its_form_and_holds_rounded_weights(bits, steps):
    plain, model = tiny_model(), tiny_model()
    model.embedding.weight.requires_grad_(False)
    qat.quantize_aware(model, STREAM, steps, bits)
    assert model.state_dict().keys() == plain.state_dict().keys() and not model.training
    rounded = {f"{name}.weight" for name in surgery.linears(model)}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)) == (name not in rounded)
        assert parameter.requires_grad == (name != "embedding.weight") and parameter.grad is None
    for layer in surgery.linears(model).values():
        assert type(layer) is torch.nn.Linear
        assert max(len(row.unique()) for row in layer.weight) <= (3 if bits is None else 2**bits)


@pytest.mark.parametrize("bits", [2, None])
def test_training_with_a_teacher_brings_the_rounded_model_closer_to_it(bits):
    plain, text = tiny_model(), tokens(8, 32, seed=1)
    away = []
    for steps in (0, 30):
        model = tiny_model()
        qat.quantize_aware(model, STREAM, steps, bits, teach=True)
        away.append(qat.taught_by(plain)(model, text).item())
    assert away[1] < away[0]


def test_training_lowers_the_loss_of_the_rounded_model():
    text, losses = torch.arange(2000) % 7, []
    for steps in (0, 30):
        model = tiny_model()
        qat.quantize_aware(model, text, steps, 2)
        losses.append(evaluate.mean_nll(model, text[None, :32]))
    assert losses[1] < losses[0]


def test_the_teachers_loss_is_the_divergence_and_0_for_itself():
    teacher, student, text = tiny_model(0), tiny_model(1), tokens(2, 9)
    loss = qat.taught_by(teacher)
    p, q = (model(text[:, :-1]).double().softmax(-1) for model in (teacher, student))
    assert loss(student, text).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert abs(loss(copy.deepcopy(teacher), text).item()) < 1e-5


def test_the_same_seed_trains_the_same_and_another_another():
    found = []
    for seed in (0, 0, 1):
        model = tiny_model()
        qat.quantize_aware(model, STREAM, 2, 3, seed=seed)
        found.append(model.blocks[0].attention.q_proj.weight.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_apply_counts_bits_and_refuses_before_it_changes_anything():
    usual = {"bits": 2, "ternary": False, "group_size": 8, "steps": 1, "teacher": True, "seed": 0}
    found = qat.apply(tiny_model(), tokens(8, 32), Namespace(**usual))
    assert found["bits per weight"] == 2 + 16 / 8 and found["passes over the text"] == 1
    for changed, words in (
        ({"bits": 9}, "bits must be"),
        ({"group_size": 7}, "group_size must divide the 16 columns, got 7"),
        ({"group_size": 0}, "group_size must divide"),
        ({"steps": -1}, "--steps must not be negative"),
    ):
        model = tiny_model()
        with pytest.raises(ValueError, match=words):
            qat.apply(model, tokens(8, 32), Namespace(**(usual | changed)))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))
        assert all(type(layer) is torch.nn.Linear for layer in surgery.linears(model).values())
