"""Logits of two models for the tests of distillation, the losses number by number, and how far results may differ."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from tests.conftest import tolerance

SEEDS = st.integers(0, 2**32 - 1)
KINDS = ("normal", "rising", "falling", "far apart", "one large", "equal", "alike")
DRAWN = {
    "seed": SEEDS,
    "tokens": st.sampled_from([1, 2, 3, 7]),
    "vocabulary": st.sampled_from([1, 2, 5, 16, 17, 33, 67]),
    "kind": st.sampled_from(KINDS),
    "temperature": st.sampled_from([0.7, 1.0, 2.0, 3.0, 8.0]),
}


def drawn(seed: int, tokens: int, vocabulary: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """student, teacher float32 `[tokens, vocabulary]` and targets int64 `[tokens]`, about a quarter of them -100."""
    rng = np.random.default_rng(seed)
    student, teacher = 3 * rng.normal(size=(2, tokens, vocabulary))
    ramp = np.linspace(-20, 20, vocabulary)
    if kind in ("rising", "falling"):  # the maximum moves with every block, of the two models in opposite directions
        student, teacher = (student + ramp, teacher - ramp) if kind == "rising" else (student - ramp, teacher + ramp)
    if kind == "far apart":
        student, teacher = 100 * student - 1000, 100 * teacher + 500
    if kind == "one large":
        student[:, rng.integers(vocabulary)] += 200
        teacher[:, rng.integers(vocabulary)] += 200
    if kind == "equal":
        student[:], teacher[:] = 5.0, -2.0
    if kind == "alike":
        teacher = student
    targets = np.where(rng.random(tokens) < 0.25, -100, rng.integers(vocabulary, size=tokens))
    return student.astype(np.float32), teacher.astype(np.float32), targets


def log_probabilities(row: np.ndarray, temperature: float) -> list[float]:
    """log softmax of one row, with sums that lose nothing."""
    scaled = [float(x) / temperature for x in row]
    top = max(scaled)
    norm = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - norm for x in scaled]


def by_hand(student, teacher, targets, temperature: float) -> tuple[list[float], list[float]]:
    """soft and hard of each token."""
    soft, hard = [], []
    for s, t, target in zip(student, teacher, targets, strict=True):
        q, p = log_probabilities(s, temperature), log_probabilities(t, temperature)
        soft.append(temperature**2 * math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        hard.append(0.0 if target == -100 else -log_probabilities(s, 1.0)[target])
    return soft, hard


def close(dtype, student, teacher, temperature: float) -> dict[str, float]:
    """The tolerance of losses and norms: sums over the vocabulary, of logits divided by T, times T²."""
    largest = max(1.0, float(np.abs(student).max() + np.abs(teacher).max()))
    return tolerance(dtype, student.shape[1], scale=largest * max(temperature, 1 / temperature))


def close_gradient(dtype, student, teacher, weigh: float, temperature: float) -> dict[str, float]:
    """The tolerance of a gradient of weights up to `weigh`: a probability is as exact as its logit less its norm."""
    largest = max(1.0, float(np.abs(student).max() + np.abs(teacher).max()) / min(temperature, 1.0))
    exact = tolerance(dtype, scale=weigh * (1 + temperature))
    return {"rtol": exact["rtol"], "atol": exact["atol"] + largest * tolerance(np.float32)["atol"] * weigh * 2}
