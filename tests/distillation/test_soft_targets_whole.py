"""Soft targets as whole losses against DistilBERT's own, and what chapter and kernels refuse, in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.distillation.soft_targets import cosine_losses, hinton_loss, token_gradient, token_losses, triple_loss
from tests.conftest import DEVICE, golden, kernel, tolerance
from tests.distillation.logits import DRAWN, by_hand, close, drawn

kernels = kernel("distillation.soft_targets")


class TestWholeLosses:
    def test_equal_distilberts(self):
        held = golden("sparse/soft_targets")
        student, teacher = (held[f"{who}_logits"].reshape(-1, 11) for who in ("student", "teacher"))
        states = tuple(held[f"distil_hidden_{who}"].reshape(-1, 8) for who in ("student", "teacher"))
        attended, labels = held["distil_attention_mask"].ravel(), held["distil_mlm_labels"].ravel()
        exact = tolerance(np.float32, scale=10)
        found = triple_loss(student, teacher, labels, states, attended)
        np.testing.assert_allclose(found, held["distilbert_paper_ce5_mlm2_cos1_T2"], **exact)
        found = hinton_loss(student, teacher, labels, 3.0, 1.0)  # restricted to what has a target
        np.testing.assert_allclose(found, held["distilbert_ce_restrict_T3"], **exact)
        following = np.full((3, 5), -100)
        following[:, :-1] = held["distil_mlm_labels"][:, 1:]
        found = triple_loss(student, teacher, following.ravel(), states, attended, weights=(1, 1, 0))
        np.testing.assert_allclose(found, held["distilbert_clm_ce_T2"], **exact)

    @given(**DRAWN, alpha=st.floats(0, 1))
    def test_weigh_means_over_the_tokens_that_have_a_target(self, seed, tokens, vocabulary, kind, temperature, alpha):
        student, teacher, targets = drawn(seed, tokens, vocabulary, kind)
        targets[0] = 0
        soft, hard = (np.array(part) for part in by_hand(student, teacher, targets, temperature))
        counts = targets != -100
        expected = alpha * soft[counts].mean() + (1 - alpha) * hard[counts].mean()
        found = hinton_loss(student, teacher, targets, temperature, alpha)
        np.testing.assert_allclose(found, expected, **close(np.float64, student, teacher, temperature))
        states = np.ones((2, tokens, 3))
        weights = (1 - alpha, 2.0, 3.0)
        expected = (1 - alpha) * soft.mean() + 2 * hard[counts].mean()
        found = triple_loss(student, teacher, targets, tuple(states), None, temperature, weights)
        np.testing.assert_allclose(found, expected, **close(np.float64, student, teacher, temperature))

    def test_refusals_name_what_is_wrong(self):
        x, at = np.ones((2, 5)), np.array([1, 4])
        hole = np.where(np.eye(2, 5), np.nan, x)
        for call, words in (
            (lambda: token_losses(x, np.ones((2, 7)), at), "share one vocabulary, they have 5 and 7 tokens"),
            (lambda: token_losses(x, np.ones((3, 5)), at), r"of the same N tokens, got \(2, 5\), \(3, 5\), \(2,\)"),
            (lambda: token_losses(x, x, at, -2), "temperature must be positive and finite, got -2"),
            (lambda: token_losses(hole, x, at), "student / 2.0 must be finite, got 2 others"),
            (lambda: token_losses(x, hole, at), "teacher / 2.0 must be finite, got 2 others"),
            (lambda: token_losses(x, x, np.array([0, 5])), "targets must be from 0 to 4 or -100"),
            (lambda: token_gradient(x, x, at, np.ones(2), x[0], x[0]), r"need norms \[3, N\]"),
            (lambda: cosine_losses(x, x[:1]), r"of one shape, got \(2, 5\) and \(1, 5\)"),
            (lambda: cosine_losses(x, hole), "hidden states must be finite"),
            (lambda: hinton_loss(x, x, at, alpha=1.5), "alpha must be from 0 to 1, got 1.5"),
            (lambda: hinton_loss(x, x, at - at - 100), "no token counts"),
            (lambda: triple_loss(x, x, at, (x, x), np.zeros(2, bool)), "no token counts"),
        ):
            with pytest.raises(ValueError, match=words):
                call()


@pytest.mark.kernel
def test_the_kernels_refuse_what_they_cannot_compute():
    x, one = torch.ones(2, 5, device=DEVICE), torch.ones(2, device=DEVICE)
    at = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    weigh = torch.ones(3, 2, device=DEVICE), one, one
    for call, error, words in (
        (lambda: kernels.token_losses(x, x[:, :4].contiguous(), at), ValueError, "the student's vocabulary of 5, got"),
        (lambda: kernels.token_losses(x, x[:1], at), ValueError, "the student's 2 rows, got"),
        (lambda: kernels.token_losses(x, x, at[:1]), ValueError, r"targets must be \[2\], got \(1,\)"),
        (lambda: kernels.token_losses(x[0], x[0], at), ValueError, r"student must be \[N, V\]"),
        (lambda: kernels.token_losses(x, x, at, 0.0), ValueError, "temperature must be positive and finite, got 0"),
        (lambda: kernels.token_losses(x, x, at, float("nan")), ValueError, "temperature must be"),
        (lambda: kernels.token_losses(x.double(), x, at), TypeError, "student must have dtype"),
        (lambda: kernels.token_losses(x, x, at.int()), TypeError, "targets must have dtype torch.int64"),
        (lambda: kernels.token_losses(x.T.contiguous().T, x, at), ValueError, "student must be contiguous"),
        (lambda: kernels.token_gradient(x, x, at, weigh[0].T, one, one), ValueError, r"norms must be \[3, 2\], got"),
        (lambda: kernels.token_gradient(x, x, at, weigh[0], one[:1], one), ValueError, r"dsoft must be \[2\], got"),
        (lambda: kernels.token_gradient(x, x, at, weigh[0], one, one.half()), TypeError, "dhard must have dtype"),
    ):
        with pytest.raises(error, match=words):
            call()
