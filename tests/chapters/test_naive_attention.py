"""The attention chapters' baseline and yardsticks: plain attention against torch's, errors and exponents as defined."""

from __future__ import annotations

import pytest
import torch

from chapters.shared.naive_attention import exponent, naive_attend, rounding_errors, training_bytes
from minitfm.model import causal_attention
from tests.conftest import tolerance


@pytest.mark.parametrize(("heads", "kv_heads", "T", "S"), [(1, 1, 1, 1), (4, 2, 7, 7), (6, 1, 3, 11), (2, 2, 1, 5)])
def test_naive_attention_is_the_model_s(heads, kv_heads, T, S):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, T, 8), (2, kv_heads, S, 8), (2, kv_heads, S, 8)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    torch.testing.assert_close(naive_attend(q, k, v), causal_attention(q, k, v), **tolerance(torch.float64, S))


def test_exponent_does_not_see_a_constant():
    lengths = [4, 8, 16, 32]
    assert exponent(lengths, [1000 + 3 * n for n in lengths]) == pytest.approx(1)
    assert exponent(lengths, [7 * n**2 for n in lengths]) == pytest.approx(2)


def test_memory_of_naive_training_is_quadratic(lab):
    lengths = [64, 128, 256]
    assert 1.9 < exponent(lengths, [training_bytes(lab, naive_attend, n) for n in lengths]) < 2.1


def test_rounding_errors_see_an_approximation_and_not_rounding(lab):
    def without_the_first_key(q, k, v):
        return naive_attend(q, torch.cat([k[:, :, 1:2], k[:, :, 1:]], dim=2), v)

    errors = rounding_errors(lab, {"naive": naive_attend, "wrong": without_the_first_key}, seed=0)
    for what in ("logit", "gradient"):
        assert errors[f"{what} error, naive"] < 1e-5 < errors[f"{what} error, wrong"]
