"""Attention masks as predicates and as lists of blocks: what every chapter on sparse attention patterns works with.

A `Pattern` says for positions i and j whether a query sees a key; a `BlockMask` says which blocks of queries and keys
hold such a pair, `visits` says it in the form that torch wants.
Symbols: T queries, S keys; M masks, one for all heads or one for each; R = ⌈T / block_q⌉, C = ⌈S / block_k⌉ blocks.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """`pattern(i, j)`: whether queries at positions i see keys at positions j, bool, for integer arrays that broadcast.

    Positions count from 0; i may be negative (more queries than keys), j is not.
    """

    sees: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def __call__(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return self.sees(i, j)

    def __or__(self, other: Pattern) -> Pattern:
        return Pattern(lambda i, j: self(i, j) | other(i, j))

    def __and__(self, other: Pattern) -> Pattern:
        return Pattern(lambda i, j: self(i, j) & other(i, j))

    def dense(self, T: int, S: int | None = None) -> np.ndarray:
        """The mask `[T, S]`, bool; S is T if not given."""
        return visible(self, slice(0, T), T, T if S is None else S)

    def reordered(self, order: np.ndarray) -> Pattern:
        """The same pattern for tokens that were sorted: place p holds token order[p]. For T = S only."""
        return Pattern(lambda i, j: self(order[i], order[j]))


def at_least(lowest: int, **values: int) -> None:
    """Raise TypeError for a value that is no integer, ValueError for one below `lowest`."""
    for name, value in values.items():
        if operator.index(value) < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")


@dataclass(frozen=True)
class BlockMask:
    """Which blocks of queries and keys hold a pair that is seen, and the pairs of those that are not seen whole.

    shape (T, S); block_q, block_k; `partial`, `full` `[M, R, C]` bool; `tokens` `[P, block_q, block_k]` bool, the masks
    of the P partial blocks, sorted by (mask, row, column). Pairs past T or S are not seen: a block that has some is
    never full.
    """

    shape: tuple[int, int]
    block_q: int
    block_k: int
    partial: np.ndarray
    full: np.ndarray
    tokens: np.ndarray

    @cached_property
    def slots(self) -> np.ndarray:
        """Where in `tokens` a partial block is, int64 `[M, R, C]`; elsewhere meaningless."""
        return np.cumsum(self.partial).reshape(self.partial.shape) - 1

    def dense(self) -> np.ndarray:
        """Every pair: bool `[M, T, S]`."""
        (M, R, C), (T, S) = self.full.shape, self.shape
        pairs = np.repeat(self.full, self.block_q * self.block_k).reshape(M, R, C, self.block_q, self.block_k)
        pairs[self.partial] = self.tokens
        return pairs.swapaxes(2, 3).reshape(M, R * self.block_q, C * self.block_k)[:, :T, :S]

    def rows(self) -> list[slice]:
        """The queries of each row of blocks; the last row may be shorter."""
        T, block = self.shape[0], self.block_q
        return [slice(first, min(first + block, T)) for first in range(0, T, block)]


def visible(mask: Pattern | np.ndarray, rows: slice, T: int, S: int) -> np.ndarray:
    """Rows of a mask of T queries and S keys: bool `[rows, S]`."""
    if not isinstance(mask, Pattern):
        return mask[rows]
    i, j = np.arange(T)[rows, None] + S - T, np.arange(S)[None]
    return np.broadcast_to(mask(i, j), (len(i), S))


def checked_masks(masks, T: int, S: int, **blocks: int) -> list[Pattern | np.ndarray]:
    """Masks as a list. Raises what `block_mask` promises."""
    at_least(1, T=T, S=S, **blocks)
    masks = list(masks) if isinstance(masks, Sequence) else [masks]
    for mask in masks:
        if isinstance(mask, Pattern):
            continue
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError(f"a mask must be a Pattern or a bool array, got {getattr(mask, 'dtype', type(mask))}")
        if mask.shape != (T, S):
            raise ValueError(f"a mask must be [{T}, {S}], got {mask.shape}")
    if not masks:
        raise ValueError("masks must hold at least one mask")
    return masks


Visit = tuple[slice, Tensor, Tensor, Tensor | None]


def visits(mask: BlockMask) -> list[list[Visit]]:
    """For each head and row of blocks: (rows, keys visited, pairs hidden, rows that see nothing, None if all see some).

    Keys of partial blocks come first, and hidden `[rows, those]` is about them alone. A row that sees nothing hides
    nothing, so that its softmax is a number; what comes of it must be zeroed.
    """
    plan: list[list[Visit]] = [[] for _ in mask.full]
    for head, (row, rows) in itertools.product(range(len(plan)), enumerate(mask.rows())):
        partial, full = (np.flatnonzero(x[head, row]) for x in (mask.partial, mask.full))
        keys = (np.concatenate([partial, full])[:, None] * mask.block_k + np.arange(mask.block_k)).ravel()
        seen = mask.tokens[mask.slots[head, row, partial]].swapaxes(0, 1).reshape(mask.block_q, -1)
        inside = keys < mask.shape[1]  # a block that reaches past the end is partial
        seen = seen[: rows.stop - rows.start, inside[: seen.shape[1]]]
        blind = ~seen.any(axis=1, keepdims=True) & (len(full) == 0)
        blinded = torch.from_numpy(blind) if blind.any() else None
        plan[head].append((rows, torch.from_numpy(keys[inside]), torch.from_numpy(~seen & ~blind), blinded))
    return plan


def attend_visits(q: Tensor, k: Tensor, v: Tensor, plan: list[Visit], scale: float) -> Tensor:
    """Attention of grouped q, k, v by the visits of one head; autograd keeps the weights of visited blocks alone."""
    parts = []
    for rows, keys, hidden, blind in plan:
        scores = scale * (q[..., rows, :] @ k[..., keys, :].mT)
        scores[..., : hidden.shape[1]].masked_fill_(hidden, -math.inf)
        weights = scores.softmax(-1)
        weights = weights if blind is None else weights.masked_fill(blind, 0)
        parts.append(weights @ v[..., keys, :])
    return torch.cat(parts, dim=-2)
