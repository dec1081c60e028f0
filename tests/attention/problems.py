"""Attention problems that Hypothesis draws: shapes and data that break careless code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

LENGTHS = st.sampled_from((1, 13, 17, 33)) | st.integers(1, 40)  # one, primes, one past a block, and any
HEAD_SIZES = st.sampled_from((1, 16, 24, 40, 80)) | st.integers(1, 64)
BLOCKS = st.sampled_from((1, 16, 64)) | st.integers(1, 40)
HEADS = ((1, 1, 1), (1, 2, 1), (1, 1, 3), (2, 1, 2), (1, 2, 2), (2, 2, 3))  # batch, key heads, query heads for each
KINDS = ("normal", "all equal", "huge", "tiny", "rising", "outlier channel")


@dataclass(frozen=True)
class Problem:
    """q, dout `[B, H, T, D]` and k, v `[B, Hkv, S, D]`, float64 numbers that float16 can hold."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    causal: bool
    scale: float | None
    kind: str

    @property
    def largest_score(self) -> float:
        """Bound of the scores' magnitude: their rounding errors, which exp makes relative ones, grow with it."""
        scale = self.q.shape[3] ** -0.5 if self.scale is None else self.scale
        norms = (np.linalg.norm(x, axis=-1).max() for x in (self.q, self.k))
        return scale * float(np.prod(list(norms)))

    def options(self) -> dict:
        return {"causal": self.causal, "scale": self.scale}


def fill(kind: str, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of one kind. "rising": later rows are larger, so that a running maximum never stops moving."""
    x = generator.normal(size=shape)
    if kind == "all equal":
        x = np.full(shape, x.flat[0])
    if kind in ("huge", "tiny"):
        x *= {"huge": 40.0, "tiny": 1e-3}[kind]
    if kind == "rising":
        x = np.abs(x) * np.linspace(0.1, 4, shape[2])[:, None]
    if kind == "outlier channel":
        x[..., generator.integers(shape[3])] *= 20
    return x.astype(np.float16).astype(np.float64)


def make(
    kind: str, seed: int, heads: tuple[int, int, int], T: int, S: int, D: int, causal: bool, scale: float | None
) -> Problem:
    """A problem from its sizes; `heads` as in HEADS."""
    (batch, kv_heads, group), generator = heads, np.random.default_rng(seed)
    q = fill(kind, generator, (batch, kv_heads * group, T, D))
    k = fill(kind, generator, (batch, kv_heads, S, D))
    v, dout = (fill("normal", generator, x.shape) for x in (k, q))
    return Problem(q, k, v, dout, causal, scale, kind)


NORMAL = make("normal", 7, (1, 2, 2), T=19, S=34, D=24, causal=True, scale=None)
FAR_BELOW = make("normal", 0, HEADS[0], T=1, S=1, D=1, causal=True, scale=None)
FAR_BELOW.q[:], FAR_BELOW.k[:] = 1024, -1024  # one score, -2^20: exact in every dtype, times log2(e) too


def opposite_halves() -> Problem:
    """16 queries, then 16 of the other sign: dk and dv are 0 where either half alone is 2^16 or more, as q k is."""
    dout, q = np.zeros((1, 1, 32, 16)), np.full((1, 1, 32, 16), 256.0)
    k, v = np.full((1, 1, 2, 16), 256.0), np.zeros((1, 1, 2, 16))
    dout[..., 0], dout[..., 1], v[..., 0, 0] = 1, 8192, 128
    q[:, :, 16:], dout[:, :, 16:, 1] = -256, -8192
    return Problem(q, k, v, dout, causal=False, scale=2.0**-20, kind="opposite halves")


def problems(lengths=LENGTHS, head_sizes=HEAD_SIZES, kinds=KINDS, heads=HEADS) -> st.SearchStrategy[Problem]:
    """Problems of all kinds, T and S as they come."""
    return st.builds(
        make,
        kind=st.sampled_from(kinds),
        seed=st.integers(0, 2**32 - 1),
        heads=st.sampled_from(heads),
        T=lengths,
        S=lengths,
        D=head_sizes,
        causal=st.booleans(),
        scale=st.sampled_from((None, None, 0.3)),
    )


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None):
    """torch's own operator, its mask aligned at the bottom right. It gives NaN where a query sees no key."""
    T, S = q.shape[2], k.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
