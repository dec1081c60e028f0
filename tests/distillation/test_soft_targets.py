"""Soft targets: losses and gradients against a loop, torch's operators and the authors' arrays; the kernels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from chapters.distillation.soft_targets import cosine_losses, token_gradient, token_losses
from tests.conftest import DEVICE, KERNEL_DTYPES, golden, kernel, oracle, poisoned, tolerance
from tests.distillation.logits import DRAWN, SEEDS, by_hand, close, close_gradient, drawn
from tests.fences import walled

kernels = kernel("distillation.soft_targets")
REAL = {name: strategy for name, strategy in DRAWN.items() if name != "temperature"}


def norms_of(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    """Made by torch, for functions that are given them."""
    s, t = torch.from_numpy(student).double(), torch.from_numpy(teacher).double()
    return np.stack([row.logsumexp(-1).numpy() for row in (s / temperature, t / temperature, s)])


def bad_arguments() -> list[tuple]:
    """(student, teacher, targets, temperature) that have no losses, and the error."""
    x, at = np.ones((2, 5)), np.array([1, 4])
    hole, endless = x.copy(), x.copy()
    hole[1, 4], endless[0, 0] = np.nan, -np.inf
    wrong = [
        (x, np.ones((2, 6)), at, 2.0), (x, np.ones((3, 5)), at, 2.0), (x, x, at[:1], 2.0), (x, x, at[None], 2.0),
        (x[0], x[0], at, 2.0), (x[:0], x[:0], at[:0], 2.0), (x[:, :0], x[:, :0], at, 2.0), (hole, x, at, 2.0),
        (x, hole, at, 2.0), (endless, x, at, 2.0), (x, endless, at, 2.0), (x, x, at, 0.0), (x, x, at, -1.0),
        (x, x, at, np.nan), (x, x, at, np.inf), (x, x, np.array([1, 5]), 2.0), (x, x, np.array([-1, 2]), 2.0),
        (1e300 * x, x, at, 1e-30),
    ]  # fmt: skip
    return [(arguments, ValueError) for arguments in wrong] + [((x, x, at.astype(float), 2.0), TypeError)]


@pytest.mark.exercise("chapters.distillation.soft_targets.token_losses", points=3)
class TestLosses:
    @given(**DRAWN, dtype=st.sampled_from([np.float32, np.float64]))
    def test_are_those_of_a_loop(self, seed, tokens, vocabulary, kind, temperature, dtype):
        student, teacher, targets = drawn(seed, tokens, vocabulary, kind)
        student, teacher = student.astype(dtype), teacher.astype(dtype)
        before = student.copy(), teacher.copy(), targets.copy()
        soft, hard, norms = token_losses(student, teacher, targets, temperature)
        expected = by_hand(student, teacher, targets, temperature)
        assert soft.dtype == hard.dtype == norms.dtype == np.float64 and norms.shape == (3, tokens)
        exact = close(np.float64, student, teacher, temperature)
        np.testing.assert_allclose(soft, expected[0], **exact)
        np.testing.assert_allclose(hard, expected[1], **exact)
        np.testing.assert_allclose(norms, norms_of(student, teacher, temperature), **exact)
        for part, then in zip((student, teacher, targets), before, strict=True):
            np.testing.assert_array_equal(part, then)

    @given(**DRAWN)
    def test_are_torchs_summed_over_the_vocabulary(self, seed, tokens, vocabulary, kind, temperature):
        student, teacher, targets = drawn(seed, tokens, vocabulary, kind)
        soft, hard, _ = token_losses(student, teacher, targets, temperature)
        s, t = torch.from_numpy(student).double(), torch.from_numpy(teacher).double()
        log_q, log_p = (logits.div(temperature).log_softmax(-1) for logits in (s, t))
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item()
        exact = close(np.float64, student, teacher, temperature)
        np.testing.assert_allclose(soft.mean(), temperature**2 * kl, **exact)
        np.testing.assert_allclose(hard, F.cross_entropy(s, torch.from_numpy(targets), reduction="none"), **exact)

    @given(**REAL)
    def test_do_not_feel_a_shift_and_vanish_for_the_teacher_itself(self, seed, tokens, vocabulary, kind):
        student, teacher, targets = (part.astype(np.float64) for part in drawn(seed, tokens, vocabulary, kind))
        targets = targets.astype(np.int64)
        moved = token_losses(student + 3, teacher - 7, targets)[:2]
        exact = close(np.float64, student, teacher, 2)
        for found, expected in zip(moved, token_losses(student, teacher, targets)[:2], strict=True):
            np.testing.assert_allclose(found, expected, **exact)
        np.testing.assert_allclose(token_losses(teacher + 5, teacher, targets)[0], 0, **exact)

    def test_a_token_without_a_target_has_soft_only_whatever_marks_it(self):
        student, teacher = np.random.default_rng(0).normal(size=(2, 3, 6))
        for mark in (-100, -1, 5):
            soft, hard, _ = token_losses(student, teacher, np.array([2, mark, 0], np.int32), 2.0, mark)
            assert (soft > 0).all() and hard[1] == 0 and (hard[[0, 2]] > 0).all()
        soft, hard, _ = token_losses(student, teacher, np.array([2, 5, 0]))
        assert hard[1] > 0 and (soft == token_losses(student, teacher, np.array([2, 5, 0]), 2.0)[0]).all()

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_equal_the_operators_and_the_copied_repositorys(self, temperature):
        held = golden("sparse/soft_targets")
        student, teacher, labels = held["cls_student"], held["cls_teacher"], held["cls_labels"]
        soft, hard, _ = token_losses(student, teacher, labels, temperature)
        exact = tolerance(np.float32, scale=10)
        np.testing.assert_allclose(soft.mean(), held[f"torch_kl_batchmean_T2_T{temperature}"], **exact)
        copied = 0.9 * soft.mean() / student.shape[1] + 0.1 * hard.mean()  # a mean over the classes, too
        np.testing.assert_allclose(copied, held[f"haitongli_kd_alpha0.9_T{temperature}_meanreduction"], **exact)

    @pytest.mark.parametrize(("arguments", "error"), bad_arguments())
    def test_refuse_what_has_none(self, arguments, error):
        with pytest.raises(error):
            token_losses(*arguments)

    @given(**REAL, place=SEEDS, value=st.sampled_from([np.nan, np.inf, -np.inf]), whose=st.booleans())
    def test_refuse_a_logit_that_is_not_finite_anywhere(self, seed, tokens, vocabulary, kind, place, value, whose):
        student, teacher, targets = (part.copy() for part in drawn(seed, tokens, vocabulary, kind))
        (student if whose else teacher).flat[place % student.size] = value
        with pytest.raises(ValueError):
            token_losses(student, teacher, targets)

    @given(**REAL, temperature=st.floats(max_value=0, allow_nan=False))
    def test_refuse_every_temperature_that_is_not_positive(self, seed, tokens, vocabulary, kind, temperature):
        with pytest.raises(ValueError):
            token_losses(*drawn(seed, tokens, vocabulary, kind), temperature)

    @given(**REAL, more=st.integers(1, 40))
    def test_refuse_vocabularies_that_differ(self, seed, tokens, vocabulary, kind, more):
        student, teacher, targets = drawn(seed, tokens, vocabulary, kind)
        with pytest.raises(ValueError):
            token_losses(student, np.pad(teacher, ((0, 0), (0, more))), targets)


@pytest.mark.exercise("chapters.distillation.soft_targets.token_gradient", points=3)
class TestGradient:
    @given(**DRAWN, dtype=st.sampled_from([np.float32, np.float64]))
    def test_is_what_autograd_finds(self, seed, tokens, vocabulary, kind, temperature, dtype):
        student, teacher, targets = drawn(seed, tokens, vocabulary, kind)
        student, teacher = student.astype(dtype), teacher.astype(dtype)
        dsoft, dhard = np.random.default_rng(seed).normal(size=(2, tokens))
        norms = norms_of(student, teacher, temperature)
        held = student, teacher, targets, norms, dsoft, dhard
        before = [part.copy() for part in held]
        found = token_gradient(*held, temperature)
        s, t = torch.from_numpy(student).double().requires_grad_(), torch.from_numpy(teacher).double()
        log_q, log_p = (logits.div(temperature).log_softmax(-1) for logits in (s, t))
        soft = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        hard = F.cross_entropy(s, torch.from_numpy(targets), reduction="none")
        (soft @ torch.from_numpy(dsoft) + hard @ torch.from_numpy(dhard)).backward()
        assert found.dtype == np.float64 and found.shape == student.shape
        np.testing.assert_allclose(found, s.grad, **tolerance(np.float64, vocabulary, scale=1e5))
        for part, then in zip(held, before, strict=True):
            np.testing.assert_array_equal(part, then)

    @given(seed=SEEDS)
    def test_nears_half_the_squared_difference_of_logits_as_the_temperature_rises(self, seed):
        student, teacher, targets = drawn(seed, 3, 7, "normal")
        norms, one = norms_of(student, teacher, 1e4), np.ones(3)
        found = token_gradient(student, teacher, targets, norms, one, 0 * one, 1e4)
        away = (student - teacher).astype(np.float64)
        np.testing.assert_allclose(found, (away - away.mean(1, keepdims=True)) / 7, atol=0.01)

    def test_a_token_without_a_target_has_soft_only_whatever_marks_it(self):
        student, teacher = np.random.default_rng(0).normal(size=(2, 3, 6))
        norms, one = norms_of(student, teacher, 2), np.ones(3)
        for mark in (-100, 5):
            found = token_gradient(student, teacher, np.array([2, mark, 0]), norms, 0 * one, one, 2.0, mark)
            assert (found[1] == 0).all() and (found[[0, 2]] != 0).all()
            found = token_gradient(student, teacher, np.array([2, mark, 0]), norms, one, one, 2.0, mark)
            assert (found[1] != 0).all()

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_equals_the_operators(self, temperature):
        held = golden("sparse/soft_targets")
        student, teacher = held["cls_student"], held["cls_teacher"]
        mean, norms = np.full(len(student), 1 / len(student)), norms_of(student, teacher, temperature)
        found = token_gradient(student, teacher, held["cls_labels"], norms, mean, 0 * mean, temperature)
        np.testing.assert_allclose(found, held[f"torch_kl_batchmean_T2_T{temperature}__grad"], **tolerance(np.float32))

    def test_equals_distilberts(self):
        held = golden("sparse/soft_targets")
        student, teacher = (held[f"{who}_logits"].reshape(-1, 11) for who in ("student", "teacher"))
        attended, labels = held["distil_attention_mask"].ravel(), held["distil_mlm_labels"].ravel()
        dsoft, dhard = 5 * attended / attended.sum(), 2 / (labels != -100).sum() * np.ones(len(labels))
        found = token_gradient(student, teacher, labels, norms_of(student, teacher, 2), dsoft, dhard)
        expected = held["distilbert_paper_ce5_mlm2_cos1_T2__grad_logits"].reshape(-1, 11)
        np.testing.assert_allclose(found, expected, **tolerance(np.float32, scale=5))

    @pytest.mark.parametrize(("arguments", "error"), bad_arguments())
    def test_refuses_what_has_none(self, arguments, error):
        student, teacher, targets, temperature = arguments
        tokens = len(student)
        with pytest.raises(error):
            token_gradient(student, teacher, targets, np.ones((3, tokens)), *np.ones((2, tokens)), temperature)

    @pytest.mark.parametrize(
        "shapes", [((2, 2), (2,), (2,)), ((3, 2), (3,), (2,)), ((3, 2), (2,), (2, 1)), ((2, 3), (2,), (2,)),
                   ((6,), (2,), (2,)), ((3, 2), (1,), (2,)), ((3, 2), (2,), ())],
    )  # fmt: skip
    def test_refuses_weights_that_do_not_fit(self, shapes):
        x = np.ones((2, 5))
        with pytest.raises(ValueError):
            token_gradient(x, x, np.array([1, 4]), *(np.ones(shape) for shape in shapes))


@pytest.mark.exercise("chapters.distillation.soft_targets.cosine_losses", points=2)
class TestCosine:
    @given(seed=SEEDS, tokens=st.sampled_from([1, 2, 7]), width=st.sampled_from([1, 3, 16, 17]))
    def test_are_torchs(self, seed, tokens, width):
        rng = np.random.default_rng(seed)
        student, teacher = rng.normal(size=(2, tokens, width)) * rng.choice([1e-7, 1.0, 1e4], (2, tokens, 1))
        before = student.copy(), teacher.copy()
        found = cosine_losses(student, teacher)
        pairs, both = list(zip(student, teacher, strict=True)), (torch.from_numpy(student), torch.from_numpy(teacher))
        expected = F.cosine_embedding_loss(*both, torch.ones(tokens).double(), reduction="none")
        assert found.shape == (tokens,) and found.dtype == np.float64
        np.testing.assert_allclose(found, expected, **tolerance(np.float32))  # whose 1e-12 is a float32
        sums = [math.fsum(a * b) / math.sqrt((math.fsum(a * a) + 1e-12) * (math.fsum(b * b) + 1e-12)) for a, b in pairs]
        np.testing.assert_allclose(found, 1 - np.array(sums), **tolerance(np.float64, width))
        np.testing.assert_array_equal((student, teacher), before)

    def test_measure_the_angle_alone(self):
        student = np.array([[3.0, 4], [3, 4], [3, 4], [3, 4], [0, 0]], np.float32)
        teacher = np.array([[30.0, 40], [-4, 3], [-6, -8], [0, 5], [1, 1]], np.float32)
        np.testing.assert_allclose(cosine_losses(student, teacher), [0, 1, 2, 0.2, 1], atol=1e-9)

    def test_are_taken_in_float64(self):
        state = np.full((1, 1000), 1e30, np.float32)
        found = cosine_losses(state, state)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, [0], atol=1e-9)

    def test_equal_distilberts(self):
        held = golden("sparse/soft_targets")
        states = (held[f"distil_hidden_{who}"].reshape(-1, 8) for who in ("student", "teacher"))
        found = cosine_losses(*states)[held["distil_attention_mask"].ravel()].mean()
        np.testing.assert_allclose(found, held["distilbert_paper_ce5_mlm2_cos1_T2__loss_cos"], **tolerance(np.float32))

    @pytest.mark.parametrize(
        ("student", "teacher"),
        [(np.ones((2, 3)), np.ones((2, 4))), (np.ones((2, 3)), np.ones((1, 3))), (np.ones(3), np.ones(3)),
         (np.ones((2, 3, 4)), np.ones((2, 3, 4))),
         (np.full((2, 3), np.nan), np.ones((2, 3))), (np.ones((2, 3)), np.full((2, 3), np.inf))],
    )  # fmt: skip
    def test_refuse_what_has_none(self, student, teacher):
        with pytest.raises(ValueError):
            cosine_losses(student, teacher)


BLOCKS = {"block": st.sampled_from([16, 32, 64]), "aligned": st.booleans()}
PRECISION = {"dtype": st.sampled_from(KERNEL_DTYPES), "teachers": st.sampled_from(KERNEL_DTYPES)}
SMALL = {**DRAWN, "tokens": st.sampled_from([1, 2, 3])}


def on_device(seed, tokens, vocabulary, kind, dtype=torch.float32, teachers=torch.float32) -> list[torch.Tensor]:
    """student, teacher and targets of `drawn`."""
    student, teacher, targets = (torch.from_numpy(part).to(DEVICE) for part in drawn(seed, tokens, vocabulary, kind))
    return [student.to(dtype), teacher.to(teachers), targets]


def numbers(*tensors: torch.Tensor) -> list[np.ndarray]:
    """What the kernel computes with."""
    return [(tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy() for tensor in tensors]


@pytest.mark.kernel
@pytest.mark.exercise("kernels.distillation.soft_targets.losses_kernel", points=4)
class TestForward:
    @given(**SMALL, **BLOCKS, **PRECISION)
    def test_gives_the_losses_of_the_reference(
        self, seed, tokens, vocabulary, kind, temperature, block, aligned, dtype, teachers
    ):
        held = [poisoned(part, aligned) for part in on_device(seed, tokens, vocabulary, kind, dtype, teachers)]
        found = kernels.token_losses(*held, temperature, block=block)
        student, teacher, targets = numbers(*held)
        expected = oracle("distillation.soft_targets").token_losses(student, teacher, targets, temperature)
        for part, wanted in zip(found, expected, strict=True):
            assert part.dtype is torch.float32 and part.shape == wanted.shape
            np.testing.assert_allclose(part.cpu(), wanted, **close(np.float32, student, teacher, temperature))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_spoils_its_own_token_only(self, value):
        for which in (0, 1):
            held = on_device(1, 3, 40, "normal")
            held[2][:] = 3
            held[which][1, 25] = value
            soft, hard, _ = kernels.token_losses(*held, block=16)
            assert soft.isfinite().tolist() == [True, False, True]
            assert hard.isfinite()[[0, 2]].all()
            assert torch.isnan(hard[1]).item() == (which == 0 and value != -torch.inf)

    def test_targets_that_are_ignored_and_others_that_do_not_exist(self):
        student, teacher, _ = on_device(2, 5, 20, "normal")
        targets = torch.tensor([3, -1, 20, -100, 19], device=DEVICE)
        soft, hard, _ = kernels.token_losses(student, teacher, targets, block=16)
        assert hard.isnan().tolist() == [False, True, True, False, False] and hard[3] == 0
        again, hard, _ = kernels.token_losses(student, teacher, targets, 2.0, 19, block=16)
        assert hard.isnan().tolist() == [False, True, True, True, False] and hard[4] == 0
        assert torch.equal(soft, again) and soft.isfinite().all()

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        held = on_device(1, 2, 17, "normal")
        expected = oracle("distillation.soft_targets").token_losses(*numbers(*held))
        held[which] = walled(held[which], begins)
        found = kernels.token_losses(*held, block=16)
        np.testing.assert_allclose(found[0].cpu(), expected[0], **tolerance(np.float32, 17, scale=20))


@pytest.mark.kernel
@pytest.mark.exercise("kernels.distillation.soft_targets.gradient_kernel", points=3)
class TestBackward:
    @staticmethod
    def inputs(seed, tokens, vocabulary, kind, temperature, **dtypes) -> list[torch.Tensor]:
        """All tensors of `token_gradient`, norms by torch."""
        held = on_device(seed, tokens, vocabulary, kind, **dtypes)
        norms = norms_of(*numbers(*held[:2]), temperature)
        weigh = np.random.default_rng(seed).choice([-1.0, 0.0, 0.5, 1.0], (2, tokens))
        return [*held, *(torch.from_numpy(part).float().to(DEVICE) for part in (norms, *weigh))]

    @given(**SMALL, **BLOCKS, **PRECISION, in_place=st.booleans())
    def test_gives_the_gradient_of_the_reference(
        self, seed, tokens, vocabulary, kind, temperature, block, aligned, dtype, teachers, in_place
    ):
        held = self.inputs(seed, tokens, vocabulary, kind, temperature, dtype=dtype, teachers=teachers)
        held = [poisoned(part, aligned) for part in held]
        before = numbers(*(part.clone() for part in held))
        found = kernels.token_gradient(*held, temperature, in_place=in_place, block=block)
        expected = oracle("distillation.soft_targets").token_gradient(*before, temperature)
        assert found.dtype is dtype and (found is held[0]) == in_place
        exact = close_gradient(dtype if dtype is not torch.float32 else np.float32, *before[:2], 1.0, temperature)
        np.testing.assert_allclose(found.float().cpu(), expected, **exact)
        for part, then in list(zip(numbers(*held), before, strict=True))[in_place:]:
            np.testing.assert_array_equal(part, then)

    def test_a_token_that_does_not_weigh_is_not_read(self):
        held = self.inputs(3, 3, 40, "normal", 2.0)
        for part in held[:2]:
            part[1] = torch.nan
        held[3][:, 1] = torch.nan
        held[4][:], held[5][:] = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1])
        held[2][:] = 7
        found = kernels.token_gradient(*held, block=16)
        assert (found[1] == 0).all() and found.isfinite().all() and (found[[0, 2]] != 0).all()

    def test_targets_that_are_ignored_add_nothing(self):
        held = self.inputs(4, 2, 20, "normal", 2.0)
        held[4][:], held[5][:], held[2][:] = 0.0, 1.0, torch.tensor([19, 2])
        found = kernels.token_gradient(*held, 2.0, 19, block=16)
        assert (found[0] == 0).all() and (found[1] != 0).all()

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("which", range(6))
    def test_loads_nothing_outside_of_its_inputs(self, which, begins):
        held = self.inputs(1, 2, 17, "normal", 2.0)
        expected = oracle("distillation.soft_targets").token_gradient(*numbers(*held))
        held[which] = walled(held[which], begins)
        found = kernels.token_gradient(*held, block=16)
        np.testing.assert_allclose(found.cpu(), expected, **tolerance(np.float32, scale=10))
