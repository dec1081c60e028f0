"""Divergences: terms, losses and gradients against exact arithmetic, torch and TRL's arrays; own texts; the kernels."""

from __future__ import annotations

import math
import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.distillation import divergences as chapter
from chapters.distillation.divergences import gkd_batch, mixture_terms, token_divergences, token_gradient
from minitfm.generate import generate
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.distillation.logits import DRAWN, SEEDS, close, close_gradient, drawn, log_probabilities
from tests.fences import walled
from tests.minitfm.models import tiny_model, tokens

kernels = kernel("distillation.divergences")
BETAS = st.sampled_from([0.0, 1e-12, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0])
REAL = {**DRAWN, "beta": BETAS}
NAMES = st.sampled_from(["limits", "trl"])


def exact_terms(log_a: np.ndarray, log_b: np.ndarray, weight: float, rest: float) -> np.ndarray:
    """The terms by their formula, in 80 digits; the larger weight is what the smaller leaves."""
    with localcontext() as context:
        context.prec, small, found = 80, Decimal(min(weight, rest)), []
        w, r = (small, 1 - small) if weight < rest else (1 - small, small)
        for a, b in zip(log_a.flat, log_b.flat, strict=True):
            a, b = Decimal(float(a)).exp(), Decimal(float(b)).exp()
            found.append(float(a * (a / (r * a + w * b)).ln() / w if weight else a - b))
    return np.array(found).reshape(log_a.shape)


def by_hand(student, teacher, beta: float, temperature: float) -> list[float]:
    """D_β of each token by exact terms of both sides."""
    found = []
    for s, t in zip(student, teacher, strict=True):
        log_q, log_p = (np.array(log_probabilities(row, temperature)) for row in (s, t))
        both = exact_terms(log_q, log_p, beta, 1 - beta), exact_terms(log_p, log_q, 1 - beta, beta)
        found.append(math.fsum(np.concatenate(both)))
    return found


@pytest.mark.exercise("chapters.distillation.divergences.mixture_terms", points=3)
class TestTerms:
    @given(
        seed=SEEDS, spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 60.0, 1e5]),
        weight=st.sampled_from([0.0, 1e-16, 1e-12, 1e-6, 0.3, 0.5]), other=st.booleans(),
    )  # fmt: skip
    def test_are_exact_for_every_weight_and_warn_of_nothing(self, seed, spread, weight, other):
        log_a, log_b = -spread * np.random.default_rng(seed).random((2, 3, 5))
        before, both = (log_a.copy(), log_b.copy()), (1 - weight, weight) if other else (weight, 1 - weight)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = mixture_terms(log_a, log_b, *both)
        assert found.dtype == np.float64 and np.isfinite(found).all()
        np.testing.assert_allclose(found, exact_terms(log_a, log_b, *both), **tolerance(np.float64))
        np.testing.assert_array_equal((log_a, log_b), before)

    def test_are_those_of_kl_at_both_ends(self):
        a, b = np.array([0.9, 0.1]), np.array([0.5, 0.5])
        np.testing.assert_allclose(mixture_terms(np.log(a), np.log(b), 0.0, 1.0), a - b)
        np.testing.assert_allclose(mixture_terms(np.log(a), np.log(b), 1.0, 0.0), a * np.log(a / b))

    @pytest.mark.parametrize("weight", [1e-16, 1e-9, 0.4, 0.6, 1.0])
    def test_are_exact_however_much_less_a_is(self, weight):
        log_a, log_b = -np.array([[39.0, 41, 60, 100, 750]]), np.zeros((1, 5))
        for pair in ((log_a, log_b), (log_b, log_a)):
            for both in ((weight, 1 - weight), (1 - weight, weight)):
                np.testing.assert_allclose(
                    mixture_terms(*pair, *both), exact_terms(*pair, *both), **tolerance(np.float64)
                )

    def test_take_what_is_0_as_a_number_on_either_side(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for weight, expected in ((0.0, [1, -1]), (0.25, [4 * np.log(4 / 3), 0]), (1.0, [1e4, 0])):
                found = mixture_terms(np.array([0.0, -1e4]), np.array([-1e4, 0.0]), weight, 1 - weight)
                np.testing.assert_allclose(found, expected, **tolerance(np.float64))


class TestReference:
    @given(**REAL, convention=NAMES)
    def test_is_the_definition(self, seed, tokens, vocabulary, kind, temperature, beta, convention):
        student, teacher, _ = drawn(seed, tokens, min(vocabulary, 17), kind)
        before = student.copy(), teacher.copy()
        losses, own, norms = token_divergences(student, teacher, beta, temperature, convention)
        exact = close(np.float64, student, teacher, temperature)
        times = beta * (1 - beta) if convention == "trl" and 0 < beta < 1 else 1
        np.testing.assert_allclose(losses, times * np.array(by_hand(student, teacher, beta, temperature)), **exact)
        held = [torch.from_numpy(x).double() / temperature for x in (student, teacher)]
        np.testing.assert_allclose(norms, torch.stack(held).logsumexp(-1), **exact)
        assert losses.dtype == own.dtype == norms.dtype == np.float64 and (losses > -1e-9).all()
        np.testing.assert_array_equal((student, teacher), before)

    @given(seed=SEEDS, beta=st.floats(1e-16, 1))
    def test_is_the_same_from_the_other_side_and_vanishes_for_the_teacher_itself(self, seed, beta):
        student, teacher, _ = drawn(seed, 3, 17, "normal")
        found = token_divergences(student, teacher, beta)[0]
        np.testing.assert_allclose(
            found, token_divergences(teacher, student, 1 - beta)[0], rtol=1e-2 if beta < 1e-9 else 1e-6
        )
        np.testing.assert_allclose(token_divergences(teacher + 5, teacher, beta)[0], 0, **tolerance(np.float32))

    @given(seed=SEEDS, short=st.sampled_from([1e-15, 1e-12, 1e-9]))
    def test_goes_to_each_kl_without_a_jump_where_trls_jumps(self, seed, short):
        student, teacher, _ = drawn(seed, 3, 17, "normal")
        student, teacher = student / 3, teacher / 3
        log_q, log_p = (torch.from_numpy(x).double().log_softmax(-1) for x in (student, teacher))
        for end, inside, kl in (
            (0.0, short, torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)),
            (1.0, 1 - short, torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)),
        ):
            np.testing.assert_allclose(
                token_divergences(student, teacher, end)[0], kl, **tolerance(np.float64, 17, scale=20)
            )
            near = token_divergences(student, teacher, inside)[0]
            np.testing.assert_allclose(near, kl, rtol=0, atol=1e-10 + 1e6 * short)
            assert (token_divergences(student, teacher, inside, convention="trl")[0] < 1e-4 * kl.numpy()).all()
            np.testing.assert_array_equal(
                token_divergences(student, teacher, end, convention="trl")[0],
                token_divergences(student, teacher, end)[0],
            )

    @given(**DRAWN, beta=BETAS.filter(lambda beta: beta != 1e-12), convention=NAMES)
    def test_gradient_is_what_autograd_finds(self, seed, tokens, vocabulary, kind, temperature, beta, convention):
        kind = "normal" if kind in ("far apart", "one large") else kind  # the plain formula needs m > 0
        student, teacher, _ = drawn(seed, tokens, vocabulary, kind)
        dloss = np.random.default_rng(seed).normal(size=tokens)
        _, own, norms = token_divergences(student, teacher, beta, temperature)
        found = token_gradient(student, teacher, norms, own, dloss, beta, temperature, convention)
        s, t = torch.from_numpy(student).double().requires_grad_(), torch.from_numpy(teacher).double()
        log_q, log_p = (x.div(temperature).log_softmax(-1) for x in (s, t))
        q, p = log_q.exp(), log_p.exp()
        log_m, ends = (beta * p + (1 - beta) * q).log(), {0.0: p * (log_p - log_q), 1.0: q * (log_q - log_p)}
        if beta in ends:
            divergence = ends[beta].sum(-1)
        else:
            jsd = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)
            divergence = jsd / (1 if convention == "trl" else beta * (1 - beta))
        (divergence @ torch.from_numpy(dloss)).backward()
        np.testing.assert_allclose(found, s.grad, **tolerance(np.float64, vocabulary, scale=1e6))

    @given(seed=SEEDS)
    def test_gradient_goes_to_that_of_each_kl(self, seed):
        student, teacher, _ = drawn(seed, 3, 17, "normal")
        gradients = []
        for beta in (0.0, 1e-12, 1.0, 1 - 1e-12):
            _, own, norms = token_divergences(student / 3, teacher / 3, beta)
            gradients.append(token_gradient(student / 3, teacher / 3, norms, own, np.ones(3), beta))
        np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-6)
        np.testing.assert_allclose(gradients[3], gradients[2], atol=1e-6)

    @pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_equals_trls_losses_and_gradients(self, beta, temperature):
        held = golden("sparse/divergences")
        student, teacher = (held[f"{who}_logits"].reshape(-1, 11) for who in ("student", "teacher"))
        counts, name = held["labels_m100_ignored"].ravel() != -100, f"gkd_beta{beta}_T{temperature}_mask"
        losses, own, norms = token_divergences(student, teacher, beta, temperature, "trl")
        exact = tolerance(np.float32, 11)
        np.testing.assert_allclose(losses.sum() / 3, held[f"{name}0"], **exact)  # without labels: by sequences
        np.testing.assert_allclose(
            chapter.gkd_loss(student, teacher, counts, beta, temperature, "trl"), held[f"{name}1"], **exact
        )
        for mask, dloss in enumerate((np.full(15, 1 / 3), counts / counts.sum())):
            expected = held.get(f"{name}{mask}__grad_student")
            if expected is not None:
                found = token_gradient(student, teacher, norms, own, dloss, beta, temperature, "trl")
                np.testing.assert_allclose(found, expected.reshape(-1, 11), **exact)

    def test_terms_equal_trls_and_the_single_step_minillms(self):
        held = golden("sparse/divergences")
        student, teacher = (held[f"{who}_logits"].reshape(-1, 11) for who in ("student", "teacher"))
        log_q, log_p = (torch.from_numpy(x).double().log_softmax(-1).numpy() for x in (student, teacher))
        found = 0.25 * (mixture_terms(log_q, log_p, 0.5, 0.5) + mixture_terms(log_p, log_q, 0.5, 0.5))
        expected = held["gkd_beta0.5_T1.0_none_elementwise"].reshape(-1, 11)
        np.testing.assert_allclose(found, expected, **tolerance(np.float32))
        found = chapter.single_step(student, teacher, held["minillm_mask"].ravel() > 0)
        np.testing.assert_allclose(found, held["minillm_single_step_reverse_kl"], **tolerance(np.float32, 11))


TEXT = tokens(3, 20)


@pytest.mark.exercise("chapters.distillation.divergences.gkd_batch", points=2)
class TestBatch:
    @given(seed=st.integers(0, 1000), share=st.floats(0, 1), prompt=st.integers(1, 19))
    def test_is_the_text_or_what_the_student_writes(self, seed, share, prompt):
        student, before = tiny_model(), TEXT.clone()
        found = gkd_batch(student, TEXT, prompt, share, seed)
        theirs = torch.rand((), generator=torch.Generator().manual_seed(seed)) < share
        written = generate(student, TEXT[:, :prompt], 20 - prompt, temperature=1.0, seed=seed)
        assert found.dtype is torch.int64 and torch.equal(found, written if theirs else TEXT)
        assert torch.equal(TEXT, before)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_is_sampled_at_the_temperature(self, temperature):
        student = tiny_model()
        expected = generate(student, TEXT[:, :5], 15, temperature=temperature, seed=9)
        assert torch.equal(gkd_batch(student, TEXT, 5, 1.0, 9, temperature), expected)

    def test_is_the_text_where_the_draw_is_the_share(self):
        for seed in range(5):
            share = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
            assert torch.equal(gkd_batch(tiny_model(), TEXT, 5, share, seed), TEXT)

    def test_mixes_as_often_as_asked(self):
        student = tiny_model()
        drawn_ = [not torch.equal(gkd_batch(student, TEXT[:1, :6], 1, 0.3, seed), TEXT[:1, :6]) for seed in range(200)]
        assert 0.2 < np.mean(drawn_) < 0.4

    def test_leaves_no_gradient_to_the_drawing(self):
        found = gkd_batch(tiny_model(), TEXT, 5, 1.0, 0)
        assert found.shape == TEXT.shape and not found.requires_grad

    @pytest.mark.parametrize(("prompt", "share"), [(0, 0.5), (20, 0.0), (-1, 1.0), (5, -0.1), (5, 1.1), (5, math.nan)])
    def test_refuses_what_makes_no_sense(self, prompt, share):
        with pytest.raises(ValueError):
            gkd_batch(tiny_model(), TEXT, prompt, share, 0)


BLOCKS = {"block": st.sampled_from([16, 32, 64]), "aligned": st.booleans()}
PRECISION = {"dtype": st.sampled_from(KERNEL_DTYPES), "teachers": st.sampled_from(KERNEL_DTYPES)}
SMALL = {**REAL, "tokens": st.sampled_from([1, 2, 3])}


def on_device(seed, tokens, vocabulary, kind, dtype=torch.float32, teachers=torch.float32) -> list[torch.Tensor]:
    """student and teacher of `drawn`."""
    student, teacher = (torch.from_numpy(part).to(DEVICE) for part in drawn(seed, tokens, vocabulary, kind)[:2])
    return [student.to(dtype), teacher.to(teachers)]


def numbers(*tensors: torch.Tensor) -> list[np.ndarray]:
    """What the kernel computes with."""
    return [tensor.float().cpu().numpy() for tensor in tensors]


@pytest.mark.kernel
@pytest.mark.exercise("kernels.distillation.divergences.divergence_kernel", points=4)
class TestForward:
    @given(**SMALL, **BLOCKS, **PRECISION, convention=NAMES)
    def test_gives_the_losses_of_the_reference(
        self, seed, tokens, vocabulary, kind, temperature, beta, block, aligned, dtype, teachers, convention
    ):
        held = [poisoned(part, aligned) for part in on_device(seed, tokens, vocabulary, kind, dtype, teachers)]
        found = kernels.token_divergences(*held, beta, temperature, convention, block=block)
        student, teacher = numbers(*held)
        expected = oracle("distillation.divergences").token_divergences(student, teacher, beta, temperature, convention)
        for part, wanted in zip(found, expected, strict=True):
            assert part.dtype is torch.float32 and part.shape == wanted.shape
            np.testing.assert_allclose(part.cpu(), wanted, **close(np.float32, student, teacher, temperature))

    @pytest.mark.parametrize("beta", [0.0, 1e-15, 1e-6, 1 / 128, 1 / 64, 0.5, 1 - 1e-6, 1.0])
    def test_is_exact_near_the_ends(self, beta):
        student, teacher = on_device(7, 3, 40, "normal")
        for t in (teacher, student + teacher / 1000):
            losses, own, _ = kernels.token_divergences(student, t, beta, block=16)
            expected = oracle("distillation.divergences").token_divergences(*numbers(student, t), beta)
            np.testing.assert_allclose(losses.cpu(), expected[0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(own.cpu(), expected[1], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    def test_what_is_not_finite_spoils_its_own_token_only(self, value, beta):
        for which in (0, 1):
            held = on_device(1, 3, 40, "normal")
            held[which][1, 25] = value
            losses = kernels.token_divergences(*held, beta, block=16)[0]
            assert losses.isfinite().tolist() == [True, False, True]

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", [0, 1])
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        held = on_device(1, 2, 17, "normal")
        expected = oracle("distillation.divergences").token_divergences(*numbers(*held))
        held[which] = walled(held[which], begins)
        found = kernels.token_divergences(*held, block=16)
        np.testing.assert_allclose(found[0].cpu(), expected[0], **tolerance(np.float32, 17, scale=20))


@pytest.mark.kernel
@pytest.mark.exercise("kernels.distillation.divergences.gradient_kernel", points=3)
class TestBackward:
    @staticmethod
    def inputs(seed, tokens, vocabulary, kind, beta, temperature, **dtypes) -> list[torch.Tensor]:
        """All tensors of `token_gradient`, norms and own by the oracle."""
        held = on_device(seed, tokens, vocabulary, kind, **dtypes)
        _, own, norms = oracle("distillation.divergences").token_divergences(*numbers(*held), beta, temperature)
        dloss = np.random.default_rng(seed).choice([-1.0, 0.0, 0.5, 1.0], tokens)
        return [*held, *(torch.from_numpy(part).float().to(DEVICE) for part in (norms, own, dloss))]

    @given(**SMALL, **BLOCKS, **PRECISION, in_place=st.booleans(), convention=NAMES)
    def test_gives_the_gradient_of_the_reference(
        self, seed, tokens, vocabulary, kind, temperature, beta, block, aligned, dtype, teachers, in_place, convention
    ):
        held = self.inputs(seed, tokens, vocabulary, kind, beta, temperature, dtype=dtype, teachers=teachers)
        held = [poisoned(part, aligned) for part in held]
        before, setting = numbers(*(part.clone() for part in held)), (beta, temperature, convention)
        found = kernels.token_gradient(*held, *setting, in_place=in_place, block=block)
        expected = oracle("distillation.divergences").token_gradient(*before, *setting)
        assert found.dtype is dtype and (found is held[0]) == in_place
        top = max(1.0, float(np.abs(expected).max()))
        exact = close_gradient(dtype if dtype is not torch.float32 else np.float32, *before[:2], top, temperature)
        np.testing.assert_allclose(found.float().cpu(), expected, **exact)
        for part, then in list(zip(numbers(*held), before, strict=True))[in_place:]:
            np.testing.assert_array_equal(part, then)

    def test_a_token_that_does_not_weigh_is_not_read(self):
        held = self.inputs(3, 3, 40, "normal", 0.5, 1.0)
        held[4][:] = torch.tensor([1.0, 0, 2])
        for part in (*held[:2], held[2].T, held[3]):
            part[1] = torch.nan
        found = kernels.token_gradient(*held, block=16)
        assert (found[1] == 0).all() and found.isfinite().all() and (found[[0, 2]] != 0).all()

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", range(5))
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        held = self.inputs(1, 2, 17, "normal", 0.5, 1.0)
        expected = oracle("distillation.divergences").token_gradient(*numbers(*held))
        held[which] = walled(held[which], begins)
        found = kernels.token_gradient(*held, block=16)
        np.testing.assert_allclose(found.cpu(), expected, **tolerance(np.float32, scale=10))
