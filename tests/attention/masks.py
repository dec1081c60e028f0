"""Attention masks that Hypothesis draws, and their definitions: dense masks, softmax over what they leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from chapters.shared.block_masks import Pattern
from tests.attention.problems import HEADS, Problem, make

KINDS = ("nothing", "all", "few", "half", "blocks", "rows without keys", "causal")
SIZES = st.sampled_from((1, 13, 16)) | st.integers(1, 40)


def dense_mask(kind: str, seed: int, T: int, S: int, block: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Bool [T, S]. "blocks": dead and full blocks, a few of them with a pair wrong."""
    generator = np.random.default_rng(seed)
    seen = generator.random((T, S)) < {"nothing": 0, "all": 1, "few": 0.05}.get(kind, 0.5)
    if kind == "blocks":
        grid = generator.random((-(-T // block[0]), -(-S // block[1]))) < 0.5
        seen = np.kron(grid, np.ones(block, dtype=bool))[:T, :S] ^ (
            generator.random((T, S)) < 0.3 / (block[0] * block[1])
        )
    if kind == "rows without keys":
        seen[generator.random(T) < 0.5] = False
    return seen & (np.arange(S) <= np.arange(T)[:, None] + S - T) if kind == "causal" else seen


def as_pattern(dense: np.ndarray) -> Pattern:
    """The same as a predicate of positions."""
    T, S = dense.shape
    return Pattern(lambda i, j: dense[i - (S - T), j])


@dataclass(frozen=True)
class Masked:
    """An attention problem and the masks of its heads, one or one for each."""

    problem: Problem
    masks: list[np.ndarray]

    @property
    def seen(self) -> np.ndarray:
        """Bool [H, T, S]."""
        return np.broadcast_to(np.stack(self.masks), (self.problem.q.shape[1], *self.masks[0].shape))


def masked(
    kind: str, seed: int, heads: tuple[int, int, int], T: int, S: int, D: int, each: bool, data: str, block=(16, 16)
) -> Masked:
    """A problem from its sizes, as `make`; `each`: a mask for each head."""
    problem = make(data, seed, heads, T, S, D, causal=False, scale=None)
    count = problem.q.shape[1] if each else 1
    return Masked(problem, [dense_mask(kind, seed + n, T, S, block) for n in range(count)])


def masked_problems(lengths, head_sizes, data=("normal",), heads=HEADS):
    """Problems with masks of all kinds."""
    return st.builds(
        masked,
        kind=st.sampled_from(KINDS),
        seed=st.integers(0, 2**31),
        heads=st.sampled_from(heads),
        T=lengths,
        S=lengths,
        D=head_sizes,
        each=st.booleans(),
        data=st.sampled_from(data),
    )


def definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out and lse by all scores at once, −inf where seen `[H, T, S]` is False; 0 and −inf where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.where(seen, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    highest = np.maximum(scores.max(axis=-1, keepdims=True), np.finfo(np.float64).min)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, highest + np.log(total), -np.inf)[..., 0]
    return weights / np.where(total > 0, total, 1) @ v, lse


def block_of(dense: np.ndarray, row: int, column: int, block_q: int, block_k: int) -> np.ndarray:
    """One block of a mask [block_q, block_k], False past its ends."""
    found = np.zeros((block_q, block_k), dtype=bool)
    part = dense[row * block_q : (row + 1) * block_q, column * block_k : (column + 1) * block_k]
    found[: part.shape[0], : part.shape[1]] = part
    return found
