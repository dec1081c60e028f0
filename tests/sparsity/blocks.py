"""Blocks of weights by the tests' own means: every mask there is, the optimum, greedy by loop, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from scipy.optimize import linprog


def every_mask(n: int, m: int) -> np.ndarray:
    """All masks with n in every row and column, from all 2^(m²), in falling order as binary numbers."""
    digits = np.arange(m * m)[::-1]
    masks = (np.arange(2 ** (m * m))[::-1, None] >> digits & 1).astype(bool).reshape(-1, m, m)
    return masks[(masks.sum(1) == n).all(1) & (masks.sum(2) == n).all(1)]


def cut(matrix: np.ndarray, m: int) -> Iterator[np.ndarray]:
    """The m × m blocks of a matrix, row by row of blocks."""
    for top, left in itertools.product(range(0, len(matrix), m), range(0, matrix.shape[1], m)):
        yield matrix[top : top + m, left : left + m]


def optimum(block: np.ndarray, n: int, full: bool) -> float:
    """The most magnitude that n in every row and column can keep (full), or at most n; by a linear program.

    It is a flow, so one of its best solutions is whole.
    """
    m = len(block)
    sums = np.concatenate([np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))])
    limits = {"A_eq" if full else "A_ub": sums, "b_eq" if full else "b_ub": np.full(2 * m, n)}
    return -linprog(-np.abs(block).ravel(), bounds=(0, 1), **limits).fun


def greedy_by_loop(block: np.ndarray, n: int) -> np.ndarray:
    """The greedy mask of one block, a weight at a time."""
    taken = np.zeros(block.shape, dtype=bool)
    for place in sorted(range(block.size), key=lambda place: (-abs(block.flat[place]), place)):
        row, column = divmod(place, len(block))
        if taken[row].sum() < n and taken[:, column].sum() < n:
            taken[row, column] = True
    return taken


ONES, NAN = np.ones((8, 8)), np.full((4, 4), np.nan)
# {function: {a pattern of words in the book's error: the arguments}}
REFUSED: dict[str, dict[str, tuple]] = {
    "transposable_patterns": {"n=5, m=4": (5, 4), "n=0": (0, 4), "at most 4.*got 8": (4, 8)},
    "mask_diversity": {"n=5, m=4": (5, 4), "n=0": (0, 4)},
    "best_mask": {
        "6 rows and 8 columns.*m=4": (np.ones((6, 8)), every_mask(2, 4)),
        "8 rows and 6 columns.*m=4": (np.ones((8, 6)), every_mask(2, 4)),
        r"patterns must be.*\(90, 16\)": (ONES, every_mask(2, 4).reshape(90, 16)),
        r"patterns must be.*\(90, 4, 2\)": (ONES, every_mask(2, 4)[..., :2]),
        r"at least one.*\(0, 4, 4\)": (ONES, every_mask(2, 4)[:0]),
        "or infinity": (np.full((4, 4), np.inf), every_mask(2, 4)),
        "NaN": (NAN, every_mask(2, 4)),
        r"\(16,\)": (np.ones(16), every_mask(2, 4)),
    },
    "greedy_mask": {
        "n=5, m=4": (ONES, 5, 4),
        "n=0": (ONES, 0, 4),
        "8 rows and 9 columns.*m=8": (np.ones((8, 9)), 4, 8),
        "4 rows and 8 columns.*m=8": (np.ones((4, 8)), 4, 8),
        "NaN": (NAN, 2, 4),
        r"\(0, 4\)": (np.ones((0, 4)), 2, 4),
    },
}
