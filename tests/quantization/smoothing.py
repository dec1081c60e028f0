"""What the tests of SmoothQuant draw: norms with what reads them, matrices of every temper, int8 codes and scales."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from tests.conftest import DEVICE, oracle

SEEDS = st.integers(0, 2**32 - 1)
ROWS, COLUMNS = st.sampled_from([1, 2, 7, 16, 17]), st.sampled_from([1, 3, 16, 31, 33])
TILE = {"block_m": 16, "block_n": 16, "block_k": 32}
TEMPERS = {
    "plain": lambda x: x,
    "outlier column": lambda x: x * np.where(np.arange(x.shape[1]) == x.shape[1] // 2, 100, 1),
    "huge": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-8,
    "some rows zero": lambda x: x * (np.arange(len(x)) % 2)[:, None],
    "constant": lambda x: np.full_like(x, -3.0),
}


@st.composite
def matrices(draw, rows=ROWS, columns=COLUMNS, tempers=tuple(TEMPERS), dtypes=(np.float32, np.float64)) -> np.ndarray:
    """`[rows, columns]` of one of the tempers."""
    plain = np.random.default_rng(draw(SEEDS)).standard_normal((draw(rows), draw(columns)))
    return TEMPERS[draw(st.sampled_from(tempers))](plain).astype(draw(st.sampled_from(dtypes)))


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """x `[tokens, in]` as a norm leaves it before its gain, the gain, and the weights of one to three readers."""
    columns = draw(COLUMNS)
    x = draw(matrices(columns=st.just(columns), tempers=("plain", "outlier column"), dtypes=(np.float64,)))
    rng = np.random.default_rng(draw(SEEDS))
    gain = rng.uniform(0.2, 2, columns) * np.where(rng.random(columns) < 0.2, 50, 1)
    return x, gain, [rng.standard_normal((draw(ROWS), columns)) for _ in range(draw(st.integers(1, 3)))]


def drawn(seed: int, M: int, N: int, K: int) -> tuple[torch.Tensor, ...]:
    """Codes x `[M, K]` and weight `[N, K]`, all 256 of them, and scales `[M]` and `[N]`."""
    rng = np.random.default_rng(seed)
    codes = (torch.from_numpy(rng.integers(-128, 128, (rows, K)).astype(np.int8)) for rows in (M, N))
    scales = (torch.from_numpy(rng.uniform(0.001, 0.02, rows).astype(np.float32)) for rows in (M, N))
    return tuple(part.to(DEVICE) for part in (*codes, *scales))


def reference(*parts: torch.Tensor) -> np.ndarray:
    """The chapter's result, float64."""
    return oracle("quantization.smoothquant").w8a8_matmul(*(part.cpu().numpy() for part in parts))
