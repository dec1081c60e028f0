"""Stripes of four neighbouring columns: the ways to share columns out to them, and the rounds of a greedy search.

A search is given by what proposes its moves. A round makes all that are proposed; they must touch different stripes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations

import numpy as np

Moves = list[tuple[np.ndarray, np.ndarray]]  # columns [n] and the columns [n] that take their places


@cache
def splits(width: int) -> np.ndarray:
    """All ways to share `width` columns out to stripes: `[1, 35 or 5,775; stripes; 4]` for width 4, 8 or 12.

    Columns ascend in a stripe, stripes by their first column, ways as in a dictionary: the first leaves all as it is.
    """

    def shared(left: tuple[int, ...]) -> Iterator[tuple]:
        for three in combinations(left[1:], 3):
            rest = tuple(column for column in left[1:] if column not in three)
            yield from (((left[0], *three), *others) for others in (shared(rest) if rest else [()]))

    return np.array(list(shared(tuple(range(width)))))


@cache
def stripe_choices(width: int) -> tuple[np.ndarray, np.ndarray]:
    """All fours of `width` columns `[fours, 4]`, and each of `splits` as numbers of its fours `[splits, stripes]`."""
    number = {four: i for i, four in enumerate(combinations(range(width), 4))}
    ways = [[number[tuple(stripe)] for stripe in way] for way in splits(width).tolist()]
    return np.array([*number]), np.array(ways)


def all_groups(stripes: int, size: int) -> np.ndarray:
    """All groups of `size` of so many stripes: `[groups, size]`, in the order of a dictionary."""
    return np.array(list(combinations(range(stripes), size)), dtype=int).reshape(-1, size)


def compatible(gains: np.ndarray, stripes: np.ndarray) -> list[int]:
    """Which moves a round makes, by descending gain: those that gain and touch no stripe of one chosen before.

    gains `[moves]`, stripes `[moves, n]` the stripes that each touches. Only gains above 0 count; of equal ones the
    first is chosen. gains stays as it was. Source: use_stripe_map of exhaustive_search.py.
    """
    left, free = np.where(gains > 0, gains, 0), np.ones(stripes.max(initial=0) + 1, dtype=bool)
    chosen: list[int] = []
    while left.any():
        chosen.append(int(left.argmax()))
        free[stripes[chosen[-1]]] = False
        left[~free[stripes].all(axis=1)] = 0
    return chosen


def swap_moves(gains: np.ndarray) -> Moves:
    """The swaps of a round, from the gain of every pair of columns `[in, in]`."""
    pairs = np.stack(np.triu_indices(len(gains), 1), axis=1)
    return [(pairs[i], pairs[i, ::-1]) for i in compatible(gains[*pairs.T], pairs // 4)]


def split_moves(gain: np.ndarray, split: np.ndarray, groups: np.ndarray) -> Moves:
    """The splits of a round, from the best of every group of stripes: gain, number in `splits` `[groups]`."""
    moves, ways = [], splits(4 * groups.shape[1])
    for i in compatible(gain, groups):
        places = (4 * groups[i][:, None] + np.arange(4)).ravel()
        moves.append((places, places[ways[split[i]].ravel()]))
    return moves


def climb(columns: int, propose: Callable[[np.ndarray, np.ndarray], Moves], escapes: int, seed: int) -> np.ndarray:
    """The order `[columns]` that rounds of moves lead to; where none is proposed, one of `escapes` random swaps."""
    if escapes < 0:
        raise ValueError(f"escapes must be at least 0, got {escapes}")
    order, changed, random = np.arange(columns), np.arange(columns // 4), np.random.default_rng(seed)
    while columns > 4:
        moves = propose(order, changed)
        if not moves and not escapes:
            break
        if not moves:
            escapes -= 1
            first, other = random.integers(columns), random.integers(columns - 4)
            pair = np.array([first, other + 4 * (other // 4 >= first // 4)])  # of another stripe
            moves = [(pair, pair[::-1])]
        before = order.copy()
        for places, sources in moves:
            order[places] = before[sources]
        changed = np.unique(np.concatenate([to[to // 4 != source // 4] for to, source in moves]) // 4)
    return order
