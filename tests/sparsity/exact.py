"""Weights with one right answer: what is kept of them, and how a group is written down."""

from __future__ import annotations

import numpy as np
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as convert

from tests.sparsity.compressed import spelled, stored

# bits of a group, a digit for each non-zero -> its nibble; None: three or four, which torch encodes by dropping some
NIBBLES = dict(zip(range(16), (14, 14, 14, 14, 9, 13, 9, None, 8, 12, 8, None, 4, None, None, None), strict=True))

FINE = np.array([[1, 1 + 1e-12, -1, -1 - 1e-12]])
TINY = np.array([[1e-31, 3e-31, -3e-30, 2e-31]])
LOWEST = np.array([[-128, 127, 1, 2, 0, 3, -3, 4]], dtype=np.int8)
FOUR_ROWS = np.array([[1.0, 1, 2]] * 4 + [[1, 3, 1]] + [[1, 0, 1]] * 3)

# {function: {what it shows: (weight, further arguments, mask)}}
KEPT: dict[str, dict[str, tuple]] = {
    "n_m_mask": {
        "n counts what is kept, int8 has its lowest value": (LOWEST, (1, 4), [[1, 0, 0, 0, 0, 0, 0, 1]]),
        "of more than four too": (LOWEST, (3, 8), [[1, 1, 0, 0, 0, 0, 0, 1]]),
        "compared in float64": (FINE, (), [[0, 1, 0, 1]]),
        "none is too small": (TINY, (), [[0, 1, 1, 0]]),
        "subnormal": (TINY * 1e-290, (), [[0, 1, 1, 0]]),
    },
    "block_mask": {
        "four rows of one column, the first of equals": (FOUR_ROWS, (0.5,), [[1, 1, 1]] * 4 + [[0, 0, 0]] * 4),
        "4.5 rounds to 4": (np.ones((1, 9)), (0.5, 1), [[1] * 5 + [0] * 4]),
        "3.5 rounds to 4": (np.ones((1, 7)), (0.5, 1), [[1] * 3 + [0] * 4]),
        "int8 has its lowest value": (np.array([[-128, 3], [127, 3]], dtype=np.int8), (0.5, 2), [[1, 0]] * 2),
        "sums beyond int8": (np.tile(LOWEST[:, :3], (4, 1)), (2 / 3,), [[1, 0, 0]] * 4),
        "compared in float64": (FINE, (0.5, 1), [[0, 1, 0, 1]]),
        "none is too small": (np.tile(TINY, (2, 1)), (0.5, 2), [[0, 1, 1, 0]] * 2),
    },
}


def least_and_next_to_one(dtype: type) -> np.ndarray:
    """A 2:4 weight [2, 64] with non-zeros at 1 and 3 of each group: the least, and the next to 1 (int8: -128)."""
    least, next_to_one = (
        (1, -128) if dtype == np.int8 else (np.finfo(dtype).smallest_subnormal, 1 + np.finfo(dtype).eps)
    )
    return np.tile(np.array([0, least, 0, next_to_one, 0, -1, 0, -least]).astype(dtype), (2, 8))


def group_of(bits: int) -> tuple[np.ndarray, str]:
    """The group whose non-zeros are the digits of `bits`, and torch's own hexadecimal digit for it."""
    group = np.array([bits >> 3 & 1, bits >> 2 & 1, bits >> 1 & 1, bits & 1]) * np.array([2.0, -3.0, 5.0, -7.0])
    by_torch = convert(torch.from_numpy(group).half().tile(32, 8))[1]
    return group, spelled(by_torch.numpy())[0][0]


def mixed(dtype: type, rows: int, words: int, seed: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """(float64 x, values of `dtype`, metadata), and the dense weight in float64."""
    values, metadata, dense, _ = stored("normal", rows, 2 * words, seed)
    values, dense = (20 * values).astype(dtype), (20 * dense).astype(dtype).astype(np.float64)
    x = np.random.default_rng(seed).normal(size=(3, dense.shape[1]))
    return (x, values, metadata.view(np.int32) if dtype == np.int8 else metadata), dense
