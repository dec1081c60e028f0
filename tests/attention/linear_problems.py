"""Problems of linear attention: features and values that Hypothesis draws, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from tests.conftest import DEVICE, poisoned, tolerance

KINDS = ("normal", "all equal", "huge", "tiny", "outlier channel")


@dataclass(frozen=True)
class Problem:
    """Positive features q, k `[B, H, T, F]`, values and a gradient `[B, H, T, D]`; float64 that float16 can hold."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.q, self.k, self.v


def make(kind: str, seed: int, T: int, features: int, D: int, leading: tuple[int, int] = (1, 2)) -> Problem:
    """One problem from its sizes. No key weighs nothing, or there would be nothing to divide by."""
    generator = np.random.default_rng(seed)
    q, k = (np.exp(generator.normal(size=(*leading, T, features)) / 2) for _ in "qk")
    v, dout = (generator.normal(size=(*leading, T, D)) for _ in "vd")
    if kind == "all equal":
        q[:], k[:] = q.flat[0], k.flat[0]
    if kind in ("huge", "tiny"):
        k *= {"huge": 100.0, "tiny": 0.05}[kind]
    if kind == "outlier channel":
        k[..., 0] *= 20
        v[..., 0] *= 20
    return Problem(*(x.astype(np.float16).astype(np.float64) for x in (q, k, v, dout)))


LENGTHS = st.sampled_from((1, 13, 17, 33)) | st.integers(1, 40)
SIZES = st.sampled_from((1, 3, 16, 24))


def problems(lengths=LENGTHS, sizes=SIZES, leading=((1, 2), (2, 1), (2, 3))) -> st.SearchStrategy[Problem]:
    """Problems of all kinds; leading: batch and heads."""
    seeds = st.integers(0, 2**32 - 1)
    return st.builds(make, st.sampled_from(KINDS), seeds, lengths, sizes, sizes, st.sampled_from(leading))


def assert_close(actual, expected, dtype=np.float64, terms: int = 40) -> None:
    """Within the rounding of a sum of `terms` numbers as large as the largest expected one."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, **tolerance(dtype, terms, scale=np.abs(expected).max(initial=1e-9)))


def assert_same(tensor: torch.Tensor, expected: np.ndarray) -> None:
    """A kernel's result, in its dtype."""
    assert_close(
        tensor.double().cpu().numpy(), expected, tensor.dtype, terms=1 if tensor.dtype == torch.float16 else 40
    )


def on_device(x: np.ndarray, dtype: torch.dtype, aligned: bool = True) -> torch.Tensor:
    """A poisoned tensor."""
    return poisoned(torch.from_numpy(x).to(DEVICE, dtype), aligned)


def wrong_input() -> list[tuple[tuple[np.ndarray, ...], dict, type[Exception]]]:
    """(q, k, v), options and the error."""
    q, v = np.ones((2, 5, 3)), np.ones((2, 5, 4))
    return [
        ((q, q[:, :, :2], v), {}, ValueError),
        ((q, q, v[:, :4]), {}, ValueError),
        ((q, q[:1], v[:1]), {}, ValueError),
        ((q, q[:, :4], v[:, :4]), {}, ValueError),
        ((q[:, :0], q[:, :0], v[:, :0]), {}, ValueError),
        ((q[0, 0], q[0, 0], v[0, 0]), {}, ValueError),
        ((q, q, v), {"eps": -1e-6}, ValueError),
        ((q, q, v), {"eps": np.nan}, ValueError),
        ((q, q, v.astype(np.float32)), {}, TypeError),
        ((q.astype(int), q.astype(int), v.astype(int)), {}, TypeError),
    ]
