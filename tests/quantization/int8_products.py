"""What the tests of int8 products draw: inputs with and without outliers, and what is known of them by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from tests.conftest import DEVICE, oracle, poisoned, tolerance

TEMPERS = {
    "plain": lambda x, rng: x,
    "outlier column": lambda x, rng: x * np.where(np.arange(x.shape[1]) == x.shape[1] // 2, 30, 1),
    "outliers anywhere": lambda x, rng: np.where(rng.random(x.shape) < 0.05, 6 + 40 * np.abs(x), x),
    "at the threshold": lambda x, rng: np.where(rng.random(x.shape) < 0.1, 6 * np.sign(x), x),
    "rows of zeros": lambda x, rng: x * (np.arange(len(x)) % 2)[:, None],
    "all equal": lambda x, rng: np.full(x.shape, -2.5),
    "halves": lambda x, rng: np.concatenate([np.full_like(x[:, :1], 3.96875), np.rint(64 * x[:, 1:]) / 64], axis=1),
    "tiny": lambda x, rng: x * 1e-7,
}


def drawn(seed: int, rows: int, columns: int, temper: str) -> np.ndarray:
    """x float16 `[rows, columns]`; "halves": a maximum of 127 / 32, so that codes lie between two integers."""
    rng = np.random.default_rng(seed)
    return TEMPERS[temper](rng.standard_normal((rows, columns)), rng).astype(np.float16)


def inputs(rows=(1, 2, 5), columns=(1, 2, 17, 32, 67)):
    """A strategy for x."""
    sizes = st.sampled_from(rows), st.sampled_from(columns)
    return st.builds(drawn, st.integers(0, 2**32 - 1), *sizes, st.sampled_from(sorted(TEMPERS)))


def by_hand(x: np.ndarray, threshold: float) -> tuple[list[list[int]], list[float], list[int]]:
    """Codes, maxima and outlier columns number by number, in float32 as the library."""
    limit = np.float32(threshold if threshold else math.inf)
    outliers = [j for j in range(x.shape[1]) if any(not abs(np.float32(v)) < limit for v in x[:, j])]
    codes, maxima = [], []
    for row in x.astype(np.float32):
        largest = max([abs(v) for v in row if abs(v) < limit], default=np.float32(0))
        largest = largest if largest >= 2.0**-119 else np.float32(0)
        inverse = np.float32(127) / largest if largest else np.float32(0)
        codes.append([0 if j in outliers else round(float(v * inverse)) for j, v in enumerate(row)])
        maxima.append(largest)
    return codes, maxima, outliers


@dataclass(frozen=True)
class Product:
    """The arguments of the product; the weights' codes are the book's, whatever is under test."""

    x: np.ndarray
    codes: np.ndarray
    absmax: np.ndarray
    threshold: float
    exact: np.ndarray | None

    def arguments(self) -> tuple:
        return self.x, self.codes, self.absmax, self.threshold, self.exact

    def close(self, dtype) -> dict[str, float]:
        """No term is larger than the largest input times the largest weight."""
        terms = np.abs(self.x.astype(float)).max() * np.abs(self.absmax).max() * 1.01
        return tolerance(dtype, self.x.shape[1], terms)


@st.composite
def products(draw, rows=(1, 2, 5), columns=(1, 2, 17, 32, 67), wide=(1, 3, 8)) -> Product:
    """Few sizes are powers of two; weights are rounded to float16, so that every dtype holds them."""
    x = draw(inputs(rows, columns))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.standard_normal((draw(st.sampled_from(wide)), x.shape[1])).astype(np.float16)
    codes, absmax, _ = oracle("quantization.llm_int8").quantize_rows(weight)
    threshold = draw(st.sampled_from([0.0, 2.0, 6.0]))
    return Product(x, codes, absmax, threshold, weight if draw(st.booleans()) else None)


def on_device(array: np.ndarray, dtype: torch.dtype | None = None, aligned: bool = True) -> torch.Tensor:
    """Inside a buffer of what spoils a result."""
    return poisoned(torch.from_numpy(array).to(DEVICE, dtype), aligned)


def statistics_by_the_book(x: np.ndarray, threshold: float, block_k: int) -> tuple[torch.Tensor, ...]:
    """What `statistics_kernel` finds, from the reference."""
    _, absmax, outliers = oracle("quantization.llm_int8").quantize_rows(x, threshold)
    columns, tiles = np.zeros(x.shape[1], np.int8), np.zeros(-(-x.shape[1] // block_k), np.int8)
    columns[outliers] = tiles[outliers // block_k] = 1
    return tuple(on_device(part) for part in (absmax, columns, tiles))
