"""For the tests of ZeroQuant: activations, drawn and made for an edge, what their codes must be near to, and layers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from tests.conftest import tolerance

SEEDS = st.integers(0, 2**32 - 1)
SIZES = {"seed": SEEDS, "rows": st.integers(1, 4), "columns": st.sampled_from([1, 2, 7, 16, 17, 33])}
TIES = np.array([[-128, 0.5, 1.5, 2.5, -0.5, -1.5, -127.5, 126.5]])
LOSSY = np.float16([[2048, 24]]), np.float16([1, 1]), np.float16([[1, 0]])  # x, weight, residual: 2049 is no float16
EVEN = [-128, 0, 2, 2, 0, -2, -128, 126]  # the codes of TIES, whose step is 1


def values(seed: int, rows: int, columns: int, dtype: type = np.float32) -> np.ndarray:
    """`[rows, columns]`: an outlier column, a small row, a row of zeros and one of ties, as far as there is room."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns))
    x[:, rng.integers(columns)] *= 40
    x[rng.integers(rows)] *= 1e-3
    if rows > 2:
        x[1], x[2] = 0, rng.integers(-64, 64, columns) / 2
    return x.astype(dtype)


def codes_by_hand(numbers: np.ndarray, bits: int, symmetric: bool) -> tuple[list[int], np.floating, np.floating]:
    """Codes, scale and zero of one group, a number at a time."""
    kind, half = numbers.dtype.type, 2 ** (bits - 1)
    largest = max(abs(number) for number in numbers)
    span = largest / kind(half) if symmetric else (max(numbers) - min(numbers)) / kind(2 * half)
    scale = span if span >= np.finfo(kind).tiny else kind(1)
    zero = kind(0)
    if not symmetric:
        zero = np.rint(min(numbers) / scale) * scale if scale == span else min(numbers)
    low, high = (-half, half - 1) if symmetric else (0, 2 * half - 1)
    return [int(min(max(np.rint((number - zero) / scale), low), high)) for number in numbers], scale, zero


def near(codes: np.ndarray, scale: np.ndarray, exact: np.ndarray) -> None:
    """Codes are the nearest to exact / scale `[tokens, columns]`, or clipped; scale is that of the largest."""
    assert codes.dtype == np.int8 and codes.shape == exact.shape and scale.shape == exact.shape[:1]
    largest = np.abs(exact).max(axis=1)
    alive = largest > 1e-30
    np.testing.assert_allclose(scale[alive], largest[alive] / 128, **tolerance(np.float32, exact.shape[1]))
    steps = np.clip(exact[alive] / scale[alive, None], -128, 127)
    assert (np.abs(codes[alive] - steps) <= 0.5 + 128 * tolerance(np.float32, exact.shape[1])["atol"]).all()
    assert (codes[~alive] == 0).all() and np.isfinite(scale).all()


def exact_norm(x: np.ndarray, weight: np.ndarray, eps: float, residual: np.ndarray | None = None) -> np.ndarray:
    """RMSNorm in float64 of the sum, which is rounded to the dtype of x first."""
    hidden = (x if residual is None else x + residual).astype(np.float64)
    return hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + eps) * weight.astype(np.float64)


def toy_layers(count: int, width: int = 3, seed: int = 0) -> list[nn.Linear]:
    """Linear layers with drawn weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [nn.Linear(width, width) for _ in range(count)]


def mean_squares(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).pow(2).mean())


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """Its values; the reference knows no bfloat16."""
    return (x.float() if x.dtype is torch.bfloat16 else x).cpu().numpy()
