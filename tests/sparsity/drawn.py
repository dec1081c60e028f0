"""Weights of every kind that a pruner meets, for Hypothesis to draw."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tests.conftest import oracle

SEEDS = st.integers(0, 2**32 - 1)
CONTENTS = ("normal", "ties", "mostly zero", "all equal", "huge", "tiny", "outlier column")
SUMMABLE = ("normal", "ties", "mostly zero", "all equal", "outlier column")  # that float16 can sum


def contents(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float16-valued float64 weights of one kind; zeros come with both signs."""
    generator = np.random.default_rng(seed)
    normal = generator.normal(size=shape)
    made = {
        "normal": normal,
        "ties": generator.integers(-2, 3, shape) * np.where(normal > 0, 1.0, -1.0),
        "mostly zero": normal * (generator.random(shape) < 0.25),
        "all equal": np.full(shape, normal.flat[0]),
        "huge": normal.clip(-3, 3) * 2e4,
        "tiny": normal * 1e-6,
        "outlier column": normal * np.where(np.arange(shape[1]) == seed % shape[1], 100.0, 1.0),
    }
    return made[kind].astype(np.float16).astype(np.float64)


def weights(columns: int, most: int = 6, rows: int = 9):
    """Strategy: weights `[1..rows, columns · 1..most]` of any kind."""
    shapes = st.tuples(st.integers(1, rows), st.integers(1, most).map(lambda count: count * columns))
    return st.builds(contents, st.sampled_from(CONTENTS), shapes, SEEDS)


def pruned(weight: np.ndarray) -> np.ndarray:
    """A 2:4 weight by the book's own mask; what it drops becomes +0, zeros that it keeps stay as they are."""
    return np.where(oracle("sparsity.n_m").n_m_mask(weight), weight, 0)


def first_largest(magnitudes: np.ndarray, count: int) -> list[int]:
    """Where the `count` largest stand, of equal ones the first; ascending."""
    return sorted(sorted(range(magnitudes.size), key=lambda index: (-magnitudes[index], index))[:count])
