"""SparseGPT and OBS by their definitions: no Cholesky factor, an inverse of what is left for every column."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from tests.conftest import oracle, tolerance
from tests.quantization.problems import grid_of_row, nearest
from tests.sparsity.drawn import first_largest

EXERCISES = ("obs_step", "threshold_mask", "solve_block", "sparsegpt")


def keep_only(function: str, chapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every exercise of the chapter but `function` be the book's, written yet or not."""
    book = oracle("pruning.sparsegpt")
    for name in set(EXERCISES) - {function}:
        monkeypatch.setattr(chapter, name, getattr(book, name))


def close(columns: int, *arrays: np.ndarray) -> dict[str, float]:
    """Float64; inverting a Hessian costs four digits."""
    return tolerance(np.float64, columns, 1e4 * max(np.abs(each).max() for each in arrays))


def damped(hessian: np.ndarray, damping: float) -> np.ndarray:
    """What is inverted: dead inputs 1, and a share of the mean on the diagonal."""
    hessian = np.where(np.eye(len(hessian), dtype=bool) & (hessian == 0), 1, hessian)
    return hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))


def pivots_of(hessian: np.ndarray) -> np.ndarray:
    """U_jj², without U: the first element of the inverse of the columns from j on."""
    return np.array([np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(len(hessian))])


def kept_of(scores: np.ndarray, sparsity: float, exact: bool) -> np.ndarray:
    """The mask of a block, by counting one score after another."""
    flat = scores.ravel().tolist()
    if exact:
        kept = first_largest(np.array(flat), len(flat) - min(round(sparsity * len(flat)), len(flat) - 1))
        return np.array([place in kept for place in range(len(flat))]).reshape(scores.shape)
    cut = sorted(flat)[int(sparsity * len(flat))]
    return np.array([[score > cut for score in row] for row in scores.tolist()])


def solved_by_hand(
    weight: np.ndarray, hessian: np.ndarray, sparsity: float = 0.5, pattern: tuple[int, int] | None = None,
    bits: int | None = None, exact: bool = False, damping: float = 0.01, block_size: int = 128,
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """Arguments of `sparsegpt`: (weight, mask, error), every column after the step of OBS that it is."""
    w = np.where(np.diag(hessian) == 0, 0, weight).astype(float)
    grids = [grid_of_row(row, bits, False) for row in weight] if bits else []
    hessian, columns, error = damped(hessian, damping), w.shape[1], 0.0
    pivots, mask = pivots_of(hessian), np.zeros(w.shape, bool)
    for j in range(columns):
        if pattern is None and j % block_size == 0:
            block = slice(j, j + block_size)
            mask[:, block] = kept_of(w[:, block] ** 2 / pivots[block], sparsity, exact)
        if pattern is not None and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            for row, score in enumerate(w[:, group] ** 2 / pivots[group]):
                mask[row, [j + place for place in first_largest(score, pattern[0])]] = True
        inverse = np.linalg.inv(hessian[j:, j:])
        for row in range(len(w)):
            target = w[row, j] if mask[row, j] else 0.0
            if bits:
                target = grids[row][0] * (nearest(target, *grids[row], bits) - grids[row][1])
            change = w[row, j] - target
            error += change**2 / (2 * inverse[0, 0])
            w[row, j:] -= change * inverse[0] / inverse[0, 0]
            w[row, j] = target
    return w, mask, error


def one_gone(w: np.ndarray, hessian: np.ndarray, gone: list[int]) -> np.ndarray:
    """The weights nearest to row w, under the Hessian, of those that are 0 at `gone`."""
    left = [k for k in range(len(w)) if k not in gone]
    solved = np.zeros(len(w))
    if left:
        solved[left] = w[left] + np.linalg.solve(hessian[np.ix_(left, left)], hessian[np.ix_(left, gone)] @ w[gone])
    return solved
