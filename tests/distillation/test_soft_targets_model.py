"""Soft targets in the model: tensors and their gradients, losses of a student, the student of `run`, its resumption."""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.distillation import soft_targets
from chapters.shared import student_lab
from minitfm import checkpoint, train
from tests.conftest import DEVICE, tolerance
from tests.distillation.logits import DRAWN, SEEDS, close, close_gradient, drawn
from tests.minitfm.models import tiny_model, tiny_tokenizer, tokens


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).to(DEVICE) for array in arrays]


@given(**DRAWN)
def test_tensors_cost_what_the_reference_says_and_so_does_the_gradient(seed, tokens, vocabulary, kind, temperature):
    arrays = drawn(seed, tokens, vocabulary, kind)
    student, teacher, targets = tensors(*arrays)
    soft, hard = soft_targets.soft_and_hard(student.requires_grad_(), teacher, targets, temperature)
    *expected, norms = soft_targets.token_losses(*arrays, temperature)
    for found, wanted in zip((soft, hard), expected, strict=True):
        np.testing.assert_allclose(found.detach().cpu(), wanted, **close(np.float32, *arrays[:2], temperature))
    weigh = np.random.default_rng(seed).normal(size=(2, tokens))
    (soft @ tensors(weigh[0])[0].float() + hard @ tensors(weigh[1])[0].float()).backward()
    wanted = soft_targets.token_gradient(*arrays, norms, *weigh, temperature)
    exact = close_gradient(np.float32, *arrays[:2], np.abs(weigh).max(), temperature)
    np.testing.assert_allclose(student.grad.cpu(), wanted, **exact)


@pytest.mark.kernel
@pytest.mark.parametrize("in_place", [False, True])
def test_the_fused_losses_train_like_the_plain_ones(in_place):
    arrays = drawn(5, 3, 40, "normal")
    student, teacher, targets = tensors(*arrays)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1  # as a head's output: a leaf must not be overwritten
    soft, hard = soft_targets.FusedLosses.apply(logits, teacher, targets, 2.0, in_place)
    (2 * soft.sum() + 3 * hard.mean()).backward()
    norms, weigh = soft_targets.token_losses(*arrays)[2], (np.full(3, 2.0), np.full(3, 1.0))
    expected = soft_targets.token_gradient(*arrays, norms, *weigh)
    np.testing.assert_allclose(leaf.grad.cpu(), expected, **tolerance(np.float32, scale=20))
    assert torch.equal(logits.detach(), leaf.grad) == in_place
    assert torch.equal(leaf.detach(), student)


@given(seed=SEEDS, alpha=st.floats(0, 1), temperature=st.sampled_from([1.0, 2.0, 5.0]))
def test_the_losses_of_a_student_are_those_of_the_reference(seed, alpha, temperature):
    student, teacher, targets = drawn(seed, 4, 9, "normal")
    targets = np.maximum(targets, 0)
    states = tuple(np.random.default_rng(seed).normal(size=(2, 4, 6)).astype(np.float32))
    given_ = *tensors(student, teacher, targets), tuple(tensors(*states))
    exact = tolerance(np.float32, 9, scale=50)
    found = soft_targets.hinton(temperature, alpha)(*given_).item()
    expected = soft_targets.hinton_loss(student, teacher, targets, temperature, alpha)
    np.testing.assert_allclose(found, expected, **exact)
    found = soft_targets.triple(temperature)(*given_).item()
    expected = soft_targets.triple_loss(student, teacher, targets, states, None, temperature)
    np.testing.assert_allclose(found, expected, **exact)


@given(
    seed=SEEDS, value=st.sampled_from([torch.nan, torch.inf, -torch.inf]), whose=st.sampled_from(["student", "teacher"])
)
def test_a_logit_that_is_not_finite_is_refused_by_name(seed, value, whose):
    student, teacher, targets = tensors(*drawn(seed, 3, 9, "normal"))
    (student if whose == "student" else teacher).view(-1)[seed % 27] = value
    with pytest.raises(ValueError, match=f"{whose} must be finite, got 1 other"):
        soft_targets.soft_and_hard(student, teacher, targets)


def test_refusals_name_what_is_wrong():
    x, at = torch.ones(2, 5, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for call, words in (
        (lambda: soft_targets.soft_and_hard(x, x[:, :4], at), "share one vocabulary, they have 5 and 4 tokens"),
        (lambda: soft_targets.soft_and_hard(x, x, at + 5), r"targets must be from 0 to 4 or -100, got \[5, 5\]"),
        (lambda: soft_targets.soft_and_hard(x, x, at - 1), "targets must be from 0 to 4 or -100"),
        (lambda: soft_targets.soft_and_hard(x, x, at, 0.0), "temperature must be positive and finite, got 0.0"),
        (lambda: soft_targets.hinton(2.0, -0.1), "alpha must be from 0 to 1, got -0.1"),
        (lambda: soft_targets.triple()(x, x, at, (x, x[:, :3])), r"must have one shape, got \[\(2, 5\), \(2, 3\)\]"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def asked(*options: str) -> Namespace:
    """The arguments of `run soft_targets`."""
    parser = ArgumentParser()
    soft_targets.options(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(options)


TEXT = tokens(20, 32)


@pytest.mark.parametrize("options", [(), ("--loss", "hinton"), ("--loss", "text"), ("--fresh",)])
def test_run_makes_a_plain_student_and_trains_it(options, tmp_path):
    model, teacher = tiny_model(layers=4), tiny_model(layers=4)
    found = soft_targets.apply(model, TEXT, asked("--steps", "2", *options))
    assert model.config.layers == len(model.blocks) == 2 and not model.training
    assert found["bits per weight"] == 16 and found["passes over the text"] == 2 * 4 * 32 / TEXT.numel()
    assert found["parameters"] == f"{teacher.num_parameters():,} -> {model.num_parameters():,}"
    expected = student_lab.fresh(model.config) if "--fresh" in options else student_lab.from_teacher(teacher, 2)
    named = {"--loss": options[-1]} if "--loss" in options else {"--loss": "triple"}
    losses = {"hinton": soft_targets.hinton(), "triple": soft_targets.triple()}
    loss = losses.get(named["--loss"])
    wanted = student_lab.taught(teacher, loss) if loss else train.next_token_loss
    student_lab.train_student(expected, TEXT.flatten(), wanted, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    checkpoint.save(tmp_path / "student", model, tiny_tokenizer())


def test_run_goes_on_where_it_was_killed_and_refuses_the_state_of_another(tmp_path, monkeypatch):
    state, whole = tmp_path / "run.pt", tiny_model()
    options = ("--steps", "6", "--layers", "1", "--state", str(state))
    soft_targets.apply(whole, TEXT, asked(*options))
    assert not state.exists()
    monkeypatch.setattr(student_lab, "SAVE_EVERY", 2)
    update, killed = train.Run.update, [5]

    def kill(run, step, loss, batch):
        if step == killed[0]:
            raise KeyboardInterrupt
        return update(run, step, loss, batch)

    monkeypatch.setattr(train.Run, "update", kill)
    with pytest.raises(KeyboardInterrupt):
        soft_targets.apply(tiny_model(), TEXT, asked(*options))
    killed[0] = -1
    for other in (("--temperature", "3"), ("--loss", "hinton"), ("--fresh",)):
        with pytest.raises(checkpoint.CheckpointError, match="belongs to a run with other purpose"):
            soft_targets.apply(tiny_model(), TEXT, asked(*options, *other))
    with pytest.raises(checkpoint.CheckpointError, match="belongs to a run with other purpose"):
        soft_targets.apply(tiny_model(seed=1), TEXT, asked(*options))
    resumed = tiny_model()
    soft_targets.apply(resumed, TEXT, asked(*options))
    assert not state.exists()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers", "3"), "a teacher with 2 layers has 1 to 2, got 3"),
        (("--layers", "0"), "has 1 to 2, got 0"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--alpha", "2"), "alpha must be from 0 to 1, got 2.0"),
        (("--temperature", "0"), "temperature must be positive and finite, got 0.0"),
        (("--temperature", "nan", "--loss", "text"), "temperature must be positive and finite, got nan"),
    ],
)
def test_run_refuses_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        soft_targets.apply(tiny_model(), TEXT, asked(*options))


def test_a_student_nears_its_teacher():
    teacher, batch = tiny_model(), tokens(8, 32, seed=3)
    away = []
    for steps in (1, 40):
        model = copy.deepcopy(teacher)
        soft_targets.apply(model, tokens(200, 32), asked("--layers", "1", "--loss", "hinton", "--steps", str(steps)))
        loss = student_lab.taught(teacher, soft_targets.hinton(2.0, 1.0))
        away.append(loss(model, batch).item())
    assert away[1] < away[0]
