"""What the tests of routing draw, and the loop that says what a line is."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import tolerance

SEEDS = st.integers(0, 2**32 - 1)
BY = st.sampled_from(["choice", "token"])
RENORMALISE = st.sampled_from(["never", "before", "after"])


@st.composite
def sizes(draw) -> tuple[int, int, int]:
    """Tokens, experts and k; 1, primes and one past a block of 16 among the tokens."""
    experts = draw(st.integers(1, 9))
    return draw(st.sampled_from([1, 2, 7, 13, 16, 17, 33])), experts, draw(st.integers(1, min(experts, 4)))


SIZES = sizes()


@st.composite
def choices(draw) -> tuple[np.ndarray, int]:
    """Chosen experts int64 [tokens, k], of which some are wanted by most and some by nobody, and how many there are."""
    tokens, experts, k = draw(SIZES)
    rng = np.random.default_rng(draw(SEEDS))
    liked = rng.exponential(size=experts) ** 3
    return np.argsort(-liked - rng.random((tokens, experts)), axis=1)[:, :k], experts


def arrivals(tokens: int, seed: int) -> np.ndarray:
    """An order in which tokens may come."""
    return np.random.default_rng(seed).permutation(tokens)


def drawn_logits(tokens: int, experts: int, seed: int, spread: float) -> Tensor:
    """Logits in quarters, so that some are equal in every dtype; all equal for a spread of 0."""
    rng = np.random.default_rng(seed)
    liked = rng.normal(size=experts)
    return torch.from_numpy((np.rint(4 * spread * (rng.normal(size=(tokens, experts)) + liked)) / 4).astype(np.float32))


def by_loop(
    expert: np.ndarray, experts: int, by: str = "choice", arrival: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Serve one choice after the other and note how many stood there."""
    tokens, k = expert.shape
    come = list(range(tokens)) if arrival is None else arrival.tolist()
    served = [(t, j) for j in range(k) for t in come] if by == "choice" else [(t, j) for t in come for j in range(k)]
    slot, load = np.empty((tokens, k), np.int64), np.zeros(experts, np.int64)
    for t, j in served:
        slot[t, j] = load[expert[t, j]]
        load[expert[t, j]] += 1
    return slot, load


def assert_routes_alike(found, wanted, experts: int) -> None:
    """(expert, weight, slot, load) as tensors against a routing: integers exactly, weights within float32."""
    expert, weight, slot, load = (part.cpu().numpy() for part in found)
    np.testing.assert_array_equal(expert, wanted.expert)
    np.testing.assert_array_equal(slot, wanted.slot)
    np.testing.assert_array_equal(load, wanted.load)
    np.testing.assert_allclose(weight, wanted.weight, **tolerance(np.float32, experts))
