"""Divergences in the model: tensors and their gradients, GKD's loss, the student of `run`, refusals in words."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.distillation import divergences
from chapters.shared import student_lab
from minitfm import checkpoint, train
from minitfm.generate import generate
from tests.conftest import DEVICE, kernel, tolerance
from tests.distillation.logits import DRAWN, SEEDS, close, close_gradient, drawn
from tests.minitfm.models import tiny_model, tiny_tokenizer, tokens

kernels = kernel("distillation.divergences")
BETAS = st.sampled_from([0.0, 1e-12, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0])
NAMES = st.sampled_from(["limits", "trl"])
LOGITS = {name: DRAWN[name] for name in ("seed", "tokens", "vocabulary", "kind")}


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).to(DEVICE) for array in arrays]


@given(**DRAWN, beta=BETAS, convention=NAMES)
def test_tensors_cost_what_the_reference_says_and_so_does_the_gradient(
    seed, tokens, vocabulary, kind, temperature, beta, convention
):
    arrays = drawn(seed, tokens, vocabulary, kind)[:2]
    setting = beta, temperature, convention
    student, teacher = tensors(*arrays)
    found = divergences.token_loss(student.requires_grad_(), teacher, *setting)
    expected, own, norms = divergences.token_divergences(*arrays, *setting)
    np.testing.assert_allclose(found.detach().cpu(), expected, **close(np.float32, *arrays, temperature))
    dloss = np.random.default_rng(seed).normal(size=tokens)
    (found @ tensors(dloss)[0].float()).backward()
    wanted = divergences.token_gradient(*arrays, norms, own, dloss, *setting)
    exact = close_gradient(np.float32, *arrays, max(1.0, np.abs(wanted).max()), temperature)
    np.testing.assert_allclose(student.grad.cpu(), wanted, **exact)


def test_tensors_keep_their_dtype_in_the_gradient():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        student = torch.randn(2, 9, device=DEVICE if dtype is not torch.float64 else "cpu").to(dtype).requires_grad_()
        divergences.token_loss(student, torch.zeros_like(student)).sum().backward()
        assert student.grad is not None and student.grad.dtype is dtype


def refused(student, teacher, *setting) -> bool:
    """Whether the reference, the tensors' loss and the gradient all refuse it."""
    tokens = len(student)
    calls = (
        lambda: divergences.token_divergences(student, teacher, *setting),
        lambda: divergences.token_gradient(student, teacher, np.ones((2, tokens)), *np.ones((2, tokens)), *setting),
        lambda: divergences.token_loss(*tensors(student, teacher), *setting),
    )
    for call in calls:
        with pytest.raises(ValueError):
            call()
    return True


class TestRefusals:
    @given(**LOGITS, place=SEEDS, value=st.sampled_from([np.nan, np.inf, -np.inf]), whose=st.booleans(), beta=BETAS)
    def test_of_a_logit_that_is_not_finite_anywhere(self, seed, tokens, vocabulary, kind, place, value, whose, beta):
        student, teacher, _ = (part.copy() for part in drawn(seed, tokens, vocabulary, kind))
        (student if whose else teacher).flat[place % student.size] = value
        assert refused(student, teacher, beta)

    @given(**LOGITS, beta=st.floats(allow_nan=True).filter(lambda beta: beta != 0 and not 1e-16 <= beta <= 1))
    def test_of_every_beta_that_is_none(self, seed, tokens, vocabulary, kind, beta):
        assert refused(*drawn(seed, tokens, vocabulary, kind)[:2], beta)

    @given(**LOGITS, temperature=st.floats(max_value=0) | st.sampled_from([math.nan, math.inf]))
    def test_of_every_temperature_that_is_not_positive(self, seed, tokens, vocabulary, kind, temperature):
        assert refused(*drawn(seed, tokens, vocabulary, kind)[:2], 0.5, temperature)

    @given(**LOGITS, more=st.integers(1, 40))
    def test_of_vocabularies_that_differ(self, seed, tokens, vocabulary, kind, more):
        student, teacher, _ = drawn(seed, tokens, vocabulary, kind)
        assert refused(student, np.pad(teacher, ((0, 0), (0, more))))

    def test_name_what_is_wrong(self):
        x = np.ones((2, 5))
        hole, model = np.where(np.eye(2, 5), np.nan, x), tiny_model()
        (y, gap), text = tensors(x, hole), tokens(2, 8)
        for call, words in (
            (lambda: divergences.token_divergences(x, x[:, :4]), r"share tokens and vocabulary, got \(2, 5\) and"),
            (lambda: divergences.token_divergences(x, x[:1]), r"share tokens and vocabulary, got \(2, 5\) and \(1, 5"),
            (lambda: divergences.token_divergences(x[0], x[0]), r"must be \[N, V\], got \(5,\)"),
            (lambda: divergences.token_divergences(x, x, 1.5), "beta must be 0 or from 1e-16 to 1, got 1.5"),
            (lambda: divergences.token_divergences(x, x, 1, 0), "temperature must be positive and finite, got 0"),
            (
                lambda: divergences.token_divergences(x, x, 1, 1, "jsd"),
                r"must be one of \('limits', 'trl'\), got 'jsd'",
            ),
            (lambda: divergences.token_divergences(hole, x), "student / 1.0 must be finite, got 2 others"),
            (lambda: divergences.token_gradient(x, x, np.ones(2), x[:, 0], x[:, 0]), r"need norms \[2, N\]"),
            (lambda: divergences.token_loss(y, gap), "teacher must be finite, got 2 other logits"),
            (lambda: divergences.gkd_loss(x, x, np.zeros(2, bool)), "no token counts"),
            (lambda: divergences.gkd_batch(model, text, 8, 0.5, 0), "prompt must be from 1 to 7, less than .* got 8"),
            (lambda: divergences.gkd_batch(model, text, 2, 1.5, 0), "share must be from 0 to 1, got 1.5"),
            (lambda: divergences.gkd(model, -1, 0.0, 1, 0), "beta must be 0 or from 1e-16 to 1, got -1"),
        ):
            with pytest.raises(ValueError, match=words):
                call()


@pytest.mark.kernel
def test_the_kernels_refuse_what_they_cannot_compute():
    x, one, two = torch.ones(2, 5, device=DEVICE), torch.ones(2, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    for call, error, words in (
        (lambda: kernels.token_divergences(x, x[:, :4].contiguous()), ValueError, "the student's vocabulary of 5, got"),
        (lambda: kernels.token_divergences(x, x[:1]), ValueError, "the student's 2 rows, got"),
        (lambda: kernels.token_divergences(x[0], x[0]), ValueError, r"student must be \[N, V\]"),
        (lambda: kernels.token_divergences(x, x, 1.1), ValueError, "beta must be 0 or from 1e-16 to 1, got 1.1"),
        (lambda: kernels.token_divergences(x, x, 1e-20), ValueError, "beta must be 0 or from 1e-16 to 1, got 1e-20"),
        (lambda: kernels.token_divergences(x, x, float("nan")), ValueError, "beta must be"),
        (lambda: kernels.token_divergences(x, x, 0.5, 0.0), ValueError, "temperature must be positive and finite"),
        (lambda: kernels.token_divergences(x, x, 0.5, 1.0, "jsd"), ValueError, "convention must be one of"),
        (lambda: kernels.token_divergences(x.double(), x), TypeError, "student must have dtype"),
        (lambda: kernels.token_divergences(x.T.contiguous().T, x), ValueError, "student must be contiguous"),
        (lambda: kernels.token_gradient(x, x, one, one, one), ValueError, r"norms must be \[2, 2\], got \(2,\)"),
        (lambda: kernels.token_gradient(x, x, two, one[:1], one), ValueError, r"own must be \[2\], got \(1,\)"),
        (lambda: kernels.token_gradient(x, x, two, one, one.half()), TypeError, "dloss must have dtype"),
    ):
        with pytest.raises(error, match=words):
            call()


TEXT = tokens(3, 20)


@given(beta=BETAS, share=st.sampled_from([0.0, 1.0]), prompt=st.integers(1, 19), convention=NAMES)
def test_the_loss_of_a_student_is_the_mean_over_the_tokens_after_the_prompt(beta, share, prompt, convention):
    teacher, student = tiny_model(seed=1), tiny_model()
    loss = divergences.gkd(teacher, beta, share, prompt, seed=3, convention=convention)
    found = loss(student, TEXT)
    batch = TEXT
    if share:
        drawn_ = divergences.zlib.crc32(TEXT.numpy().tobytes(), 3)
        batch = generate(student, TEXT[:, :prompt], 20 - prompt, temperature=1.0, seed=drawn_)
    logits = [model(batch)[:, prompt - 1 : -1].flatten(0, 1).detach().numpy() for model in (student, teacher)]
    expected = divergences.gkd_loss(*logits, None, beta, 1.0, convention)
    np.testing.assert_allclose(found.item(), expected, **tolerance(np.float32, 50, scale=10))
    found.backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    assert student.embedding.weight.grad is not None


def test_what_a_student_writes_depends_on_the_seed_and_on_the_batch_alone():
    teacher, student = tiny_model(seed=1), tiny_model()
    losses = [divergences.gkd(teacher, 1.0, 1.0, 4, seed)(student, TEXT).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def asked(*options: str) -> Namespace:
    """The arguments of `run divergences`."""
    parser = ArgumentParser()
    divergences.options(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(options)


CALIBRATION = tokens(20, 32)


@pytest.mark.parametrize("options", [(), ("--beta", "1", "--share", "0.5"), ("--convention", "trl", "--prompt", "3")])
def test_run_makes_a_plain_student_and_trains_it(options, tmp_path):
    model, teacher, args = tiny_model(layers=4), tiny_model(layers=4), asked("--steps", "2", *options)
    found = divergences.apply(model, CALIBRATION, args)
    assert model.config.layers == len(model.blocks) == 2 and not model.training
    assert found["bits per weight"] == 16 and found["passes over the text"] == 2 * 4 * 32 / CALIBRATION.numel()
    expected = student_lab.from_teacher(teacher, 2)
    prompt = 16 if args.prompt is None else args.prompt
    loss = divergences.gkd(teacher, args.beta, args.share, prompt, 0, convention=args.convention)
    student_lab.train_student(expected, CALIBRATION.flatten(), loss, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    checkpoint.save(tmp_path / "student", model, tiny_tokenizer())


def test_a_run_that_writes_its_own_text_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    state, whole = tmp_path / "run.pt", tiny_model()
    options = ("--steps", "6", "--layers", "1", "--share", "0.5", "--state", str(state))
    divergences.apply(whole, CALIBRATION, asked(*options))
    monkeypatch.setattr(student_lab, "SAVE_EVERY", 2)
    update, killed = train.Run.update, [5]

    def kill(run, step, loss, batch):
        if step == killed[0]:
            raise KeyboardInterrupt
        return update(run, step, loss, batch)

    monkeypatch.setattr(train.Run, "update", kill)
    with pytest.raises(KeyboardInterrupt):
        divergences.apply(tiny_model(), CALIBRATION, asked(*options))
    killed[0] = -1
    for other in (("--beta", "0.3"), ("--share", "0"), ("--prompt", "3"), ("--convention", "trl")):
        with pytest.raises(checkpoint.CheckpointError, match="belongs to a run with other purpose"):
            divergences.apply(tiny_model(), CALIBRATION, asked(*options, *other))
    resumed = tiny_model()
    divergences.apply(resumed, CALIBRATION, asked(*options))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers", "3"), "a teacher with 2 layers has 1 to 2, got 3"),
        (("--beta", "-0.1"), "beta must be 0 or from 1e-16 to 1, got -0.1"),
        (("--share", "2"), "share must be from 0 to 1, got 2.0"),
        (("--prompt", "32"), "prompt must be from 1 to 31, less than the text has, got 32"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
    ],
)
def test_run_refuses_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        divergences.apply(tiny_model(), CALIBRATION, asked(*options))


@pytest.mark.parametrize(("beta", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_student_nears_its_teacher(beta, share):
    teacher, away = tiny_model(), []
    measure = divergences.gkd(teacher, beta, 0.0, 8, 0)
    for steps in ("1", "40"):
        model = tiny_model()
        setting = ("--layers", "1", "--beta", str(beta), "--share", str(share), "--steps", steps)
        divergences.apply(model, tokens(200, 16), asked(*setting))
        away.append(measure(model, tokens(8, 16, seed=3)).item())
    assert away[1] < away[0]


def test_the_teacher_itself_costs_nothing_and_gets_no_gradient():
    student, teacher = tiny_model(), tiny_model()
    loss = divergences.gkd(teacher, 0.5, 1.0, 4, 0)(student, TEXT)
    loss.backward()
    assert abs(loss.item()) < 1e-5 and max(p.grad.abs().max().item() for p in student.parameters()) < 1e-4


@pytest.mark.kernel
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_kernels_train_like_the_plain_operators(beta, in_place, monkeypatch):
    student, teacher = tensors(*drawn(5, 3, 40, "normal")[:2])
    plain = student.clone().requires_grad_()
    (divergences.token_loss(plain.cpu(), teacher.cpu(), beta, 2.0) * torch.arange(3)).sum().backward()
    leaf = student.clone().requires_grad_()
    logits = leaf * 1  # as a head's output: a leaf must not be overwritten
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _self: True))
    losses = divergences.Divergence.apply(logits, teacher, beta, 2.0, "limits", in_place)
    (losses * torch.arange(3, device=DEVICE)).sum().backward()
    monkeypatch.undo()
    np.testing.assert_allclose(leaf.grad.cpu(), plain.grad.cpu(), **tolerance(np.float32, scale=20))
    assert torch.equal(logits.detach(), leaf.grad) == in_place
