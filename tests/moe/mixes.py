"""What the tests of PR-MoE draw."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from tests.conftest import golden

SEEDS = st.integers(0, 2**32 - 1)
TOKENS, DIMS = st.sampled_from([1, 2, 7, 16, 17]), st.sampled_from([1, 3, 16, 17, 33])
Arguments = dict[str, np.ndarray]


def drawn(tokens: int, dim: int, seed: int, kept: float = 0.7, dtype: type = np.float64) -> Arguments:
    """Arguments of `mix` by name: about `kept` of the tokens have a row, rows in any order, two that nobody takes.

    Gates are drawn for dropped tokens, too: a gate alone must do nothing.
    """
    rng = np.random.default_rng(seed)
    taken = rng.random(tokens) < kept
    n = int(taken.sum()) + 2
    source = np.where(taken, 0, -1)
    source[taken] = rng.permutation(n)[: n - 2]
    made = {"x": rng.normal(size=(tokens, dim)), "weight": rng.normal(size=(2, dim)) / math.sqrt(dim),
            "bias": rng.normal(size=2), "rows": rng.normal(size=(n, dim)), "source": source, "gate": rng.random(tokens),
            "mlp": rng.normal(size=(tokens, dim))}  # fmt: skip
    return {name: part if name == "source" else part.astype(dtype) for name, part in made.items()}


ARGUMENTS = st.builds(drawn, TOKENS, DIMS, SEEDS, st.sampled_from([0.0, 0.7, 1.0]))


def sound() -> Arguments:
    """Four tokens that `mix` serves."""
    made = {"x": (4, 3), "weight": (2, 3), "bias": 2, "rows": (4, 3), "gate": 4, "mlp": (4, 3)}
    return {name: np.ones(shape) for name, shape in made.items()} | {"source": np.array([3, -1, 0, -1])}


def deepspeed() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of DeepSpeed's layer, and its tokens in one row."""
    arrays = golden("sparse/deepspeed_residual")
    return arrays, arrays["x"].reshape(-1, arrays["x"].shape[-1])
