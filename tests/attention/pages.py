"""What the tests of PagedAttention draw: managers in the middle of their work, and attention over scattered blocks."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tests.conftest import oracle

book = oracle("attention.paged")


def manager_with(tables: dict[int, list[int]], lengths: dict[int, int], blocks: int = 12, size: int = 4):
    """The book's manager, put by hand into this state; the highest free block is on top."""
    manager = book.BlockManager(blocks, size)
    owners = Counter(block for table in tables.values() for block in table)
    manager.tables, manager.lengths = copy.deepcopy(tables), dict(lengths)
    manager.owners = [owners[block] for block in range(blocks)]
    manager.free_blocks = [block for block in range(blocks) if not owners[block]]
    return manager


@st.composite
def managers(draw):
    """A first sequence, and up to three that begin with some of its blocks; the last of each full or not."""
    size, order = draw(st.sampled_from([1, 2, 4, 7])), draw(st.permutations(range(12)))
    own, tables, lengths = iter(order), {}, {}
    for sequence in range(draw(st.integers(1, 4))):
        base = tables.get(0, [])
        shared = draw(st.integers(0, len(base)))
        fresh = draw(st.integers(0 if shared else 1, 2))
        tables[sequence] = base[:shared] + [next(own) for _ in range(fresh)]
        lengths[sequence] = len(tables[sequence]) * size - draw(st.integers(0, size - 1))
    return manager_with(tables, lengths, 12, size)


def state(manager) -> tuple:
    """All that a manager knows, to be compared later."""
    return copy.deepcopy((manager.tables, manager.lengths, manager.owners, manager.free_blocks))


def assert_sound(manager) -> None:
    """Each block is free or owned, never both, and owners are counted rightly; tables are as long as needed."""
    owners = Counter(block for table in manager.tables.values() for block in table)
    assert manager.owners == [owners[block] for block in range(manager.blocks)]
    assert sorted([*owners, *manager.free_blocks]) == list(range(manager.blocks))
    assert manager.lengths.keys() == manager.tables.keys()
    for sequence, table in manager.tables.items():
        assert len(table) == -(-manager.lengths[sequence] // manager.block_size) and len(set(table)) == len(table)


@dataclass(frozen=True)
class Batch:
    """Arguments of `paged_attention`, and each sequence's keys and values `[S, Hkv, D]` laid out plainly."""

    q: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    tables: np.ndarray
    lengths: np.ndarray
    new: np.ndarray
    plain: list[tuple[np.ndarray, np.ndarray]]

    def arguments(self) -> tuple:
        """In the order of the function, up to scale."""
        return self.q, self.keys, self.values, self.tables, self.lengths

    def expected(self, scale: float | None = None) -> np.ndarray:
        """Attention query by query, head by head."""
        out, row, (_, H, D) = np.empty(self.q.shape), 0, self.q.shape
        for (k, v), length, count in zip(self.plain, self.lengths, self.new, strict=True):
            for t, h in np.ndindex(count, H):
                seen, head = length - count + t + 1, h // (H // k.shape[1])
                scores = k[:seen, head] @ self.q[row + t, h].astype(np.float64)
                scores = scores * (1 / np.sqrt(D) if scale is None else scale)
                weights = np.exp(scores - scores.max())
                out[row + t, h] = weights @ v[:seen, head] / weights.sum()
            row += count
        return out


def batch(rng, lengths, new, H: int, Hkv: int, D: int, size: int, temper: float = 1.0, spare: int = 2) -> Batch:
    """Sequences of these lengths in blocks that lie at random; all other slots are NaN, all other table entries bad."""
    lengths, new = np.array(lengths, np.int32), np.array(new)
    needed = -(-lengths // size)
    keys, values = (np.full((needed.sum() + spare, size, Hkv, D), np.nan, np.float32) for _ in "kv")
    tables, free, plain = np.full((len(lengths), needed.max() + 1), 2**30, np.int32), rng.permutation(len(keys)), []
    tables[::2] = np.where(tables[::2] > 0, -7, 0)
    for n, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        tables[n, :count], free = free[:count], free[count:]
        halves = []
        for pool in (keys, values):
            half = rng.standard_normal((length, Hkv, D)).astype(np.float16).astype(np.float32)
            for j in range(length):
                pool[tables[n, j // size], j % size] = half[j]
            halves.append(half.astype(np.float64))
        plain.append(tuple(halves))
    q = (temper * rng.standard_normal((new.sum(), H, D))).astype(np.float16).astype(np.float32)
    return Batch(q, keys, values, tables, lengths, new, plain)


@st.composite
def batches(draw, decode: bool = False, sizes=(1, 3, 4, 16), longest: int = 40, head_sizes=(1, 8, 24)) -> Batch:
    """1 to 3 sequences; decode: one query each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=3))
    new = [1 if decode else draw(st.integers(1, min(length, 6))) for length in lengths]
    H, Hkv = draw(st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]))
    D, size = draw(st.sampled_from(head_sizes)), draw(st.sampled_from(sizes))
    return batch(rng, lengths, new, H, Hkv, D, size, draw(st.sampled_from([1, 1, 100])))
