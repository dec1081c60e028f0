"""Problems of Linformer: keys, values and projections that Hypothesis draws, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from tests.conftest import DEVICE, poisoned, tolerance

KINDS = ("normal", "all equal", "huge", "tiny", "outlier channel", "zero")
HEADS = ((1, 1, 1), (1, 2, 1), (2, 1, 3), (2, 2, 2))  # batch, key heads, query heads for each


@dataclass(frozen=True)
class Problem:
    """q `[B, H, T, D]`, k, v `[B, Hkv, S, D]`, e, f `[(Hkv,) slots, L]`: float64 numbers that float16 can hold."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    e: np.ndarray
    f: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.q, self.k, self.v, self.e, self.f

    @property
    def largest_score(self) -> float:
        """Bound of the scores' magnitude, of which exp makes rounding errors relative ones."""
        sums = np.abs(self.e).sum(-1).max() * np.linalg.norm(self.k, axis=-1).max()
        return float(np.linalg.norm(self.q, axis=-1).max() * sums / np.sqrt(self.q.shape[-1]))


def make(
    kind: str, seed: int, T: int, S: int, D: int, slots: int, spare: int = 0, own: bool = False, heads=(1, 2, 1)
) -> Problem:
    """A problem from its sizes: L = S + spare, `own` projections for each key head."""
    (batch, kv_heads, group), generator = heads, np.random.default_rng(seed)
    q = generator.normal(size=(batch, kv_heads * group, T, D))
    k, v = generator.normal(size=(2, batch, kv_heads, S, D))
    e, f = generator.normal(size=(2, *(kv_heads,) * own, slots, S + spare)) / np.sqrt(S)
    if kind == "all equal":
        k[:], v[:] = k.flat[0], v.flat[0]
    if kind == "zero":
        k[:], v[:] = 0, 0
    if kind in ("huge", "tiny"):
        k, v = (x * {"huge": 40.0, "tiny": 1e-3}[kind] for x in (k, v))
    if kind == "outlier channel":
        k[..., 0] *= 20
    return Problem(*(x.astype(np.float16).astype(np.float64) for x in (q, k, v, e, f)))


LENGTHS = st.sampled_from((1, 13, 17, 33)) | st.integers(1, 40)
SIZES = st.sampled_from((1, 3, 16, 24))
SLOTS = st.sampled_from((1, 5, 16, 17))


def problems(lengths=LENGTHS, sizes=SIZES, slots=SLOTS, heads=HEADS) -> st.SearchStrategy[Problem]:
    """Problems of all kinds."""
    return st.builds(
        make,
        st.sampled_from(KINDS),
        st.integers(0, 2**32 - 1),
        lengths,
        lengths,
        sizes,
        slots,
        st.sampled_from((0, 1, 15)),
        st.booleans(),
        st.sampled_from(heads),
    )


def drawn_mask(x: np.ndarray, seed: int) -> np.ndarray:
    """`[B, S]` bool: some positions are padding, not at the end only; perhaps all of a text."""
    return np.random.default_rng(seed).uniform(size=(x.shape[0], x.shape[2])) < 0.7


def attended(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float | None = None) -> np.ndarray:
    """softmax(scale q keysᵀ) values by loops over heads."""
    out, group = np.empty_like(q), q.shape[1] // keys.shape[1]
    for b, h in np.ndindex(*q.shape[:2]):
        scores = q[b, h] @ keys[b, h // group].T * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, h] = weights / weights.sum(-1, keepdims=True) @ values[b, h // group]
    return out


def slots_of(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Slots as the sum that defines them, position by position."""
    B, kv_heads, S, D = x.shape
    made = np.zeros((B, kv_heads, e.shape[-2], D))
    for b, h, s in np.ndindex(B, kv_heads, S):
        if mask is None or mask[b, s]:
            made[b, h] += (e[h] if e.ndim == 3 else e)[:, s, None] * x[b, h, s]
    return made


def assert_close(actual, expected, dtype=np.float64, terms: int = 40, scores: float = 1.0) -> None:
    """Within the rounding of a sum of `terms` numbers as large as the largest expected one, and of scores before it."""
    expected = np.asarray(expected)
    size = np.abs(expected).max(initial=1e-9)
    allowed = tolerance(dtype, terms, scale=size)
    allowed["atol"] += tolerance(np.float64 if dtype is np.float64 else np.float32, terms, scale=size * scores)["atol"]
    np.testing.assert_allclose(actual, expected, **allowed)


def on_device(x: np.ndarray, dtype: torch.dtype, aligned: bool = True) -> torch.Tensor:
    """A poisoned tensor."""
    return poisoned(torch.from_numpy(x).to(DEVICE, dtype), aligned)


def wrong_projections() -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None, type[Exception]]]:
    """(x, e, mask, error)."""
    x, e = np.ones((2, 3, 5, 4)), np.ones((2, 6))
    bad = x.copy()
    bad[1, 2, 3, 0] = np.nan
    hidden = np.ones((2, 5), dtype=bool)
    hidden[0, 3] = False  # of the other text
    return [
        (x[0], e, None, ValueError),
        (x[:, :, :0], e, None, ValueError),
        (x, e[:, :4], None, ValueError),
        (x, e[:0], None, ValueError),
        (x, e[0], None, ValueError),
        (x, np.ones((2, 2, 6)), None, ValueError),
        (x, e, np.ones((2, 6), dtype=bool), ValueError),
        (x, e, np.ones((2, 5)), TypeError),
        (x, e.astype(np.float32), None, TypeError),
        (x.astype(int), e.astype(int), None, TypeError),
        (bad, e, None, ValueError),
        (bad, e, hidden, ValueError),
        (np.where(np.isnan(bad), np.inf, bad), e, None, ValueError),
    ]
