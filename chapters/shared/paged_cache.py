"""A key-value cache in blocks: the tensors, the seam by which they enter the model, attention that follows the tables.

Which sequence owns which block is told in `chapters.attention.paged`; its `BlockManager` is what a `Pool` is made with.
`chapters.shared.serving` generates for many requests from one pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from minitfm.config import Config
from minitfm.model import causal_attention

if TYPE_CHECKING:
    from chapters.attention.paged import BlockManager


class Paged(NamedTuple):
    """The keys, or the values, of one layer, for the sequences of one pass.

    pool     `[blocks, block_size, Hkv, D]`, of all sequences
    tables   `[N, width]` int32, the blocks of each sequence, −1 past its last
    lengths  `[N]` int32, positions of each, those of this pass included
    new      N counts: which queries of the pass are whose
    """

    pool: Tensor
    tables: Tensor
    lengths: Tensor
    new: Sequence[int]


class Pool:
    """The memory that a manager's block ids stand for: k and v `[layers, blocks, block_size, Hkv, D]`."""

    def __init__(
        self,
        config: Config,
        manager: BlockManager,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.layers, manager.blocks, manager.block_size, config.kv_heads, config.head_dim)
        self.manager = manager
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in "kv")

    def append(self, new: dict[int, int]) -> None:
        """Room for new[sequence] further tokens of each, unknown sequences beginning empty; what is shared is copied.

        Raises ValueError if the blocks do not suffice for all of them, or a count is below 1; nothing is changed then.
        """
        manager = self.manager
        if min(new.values()) < 1:
            raise ValueError(f"each sequence must get at least 1 token, got {new}")
        needed = sum(manager.needed(sequence, count) for sequence, count in new.items())
        if needed > len(manager.free_blocks):
            raise ValueError(f"the pool is full: {needed} blocks needed, {len(manager.free_blocks)} of them free")
        for sequence, count in new.items():
            if sequence not in manager.tables:
                manager.allocate(sequence, count)
                continue
            for source, target in manager.append(sequence, count):
                self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]

    def slots(self, sequence: int, count: int) -> Tensor:
        """Where the last `count` positions of a sequence lie, counted through all blocks of the pool: int64."""
        size, end = self.manager.block_size, self.manager.lengths[sequence]
        positions = torch.arange(end - count, end)
        return torch.tensor(self.manager.tables[sequence])[positions // size] * size + positions % size

    def tables(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(tables, lengths) as in `Paged`, on the pool's device."""
        rows = [self.manager.tables[sequence] for sequence in sequences]
        width = max(map(len, rows))
        tables = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)
        lengths = torch.tensor([self.manager.lengths[sequence] for sequence in sequences], dtype=torch.int32)
        return tables.to(self.k.device), lengths.to(self.k.device)


class PagedCache:
    """Some `sequences` of a pool as a `minitfm.cache.Cache`.

    new None     one row per sequence, all equally long, for any model; the cache makes room itself
    new          for one pass of a model whose `attend` is the one below: new[i] tokens of sequence i, for which the
                 pool already has room, all end to end in one row; call the model with `positions`
    """

    def __init__(self, pool: Pool, sequences: Sequence[int] = (0,), new: Sequence[int] | None = None) -> None:
        if len(set(sequences)) != len(sequences) or not sequences:
            raise ValueError(f"sequences must be some, and differ, got {list(sequences)}")
        if new is not None and len(new) != len(sequences):
            raise ValueError(f"need one count for each of {len(sequences)} sequences, got {list(new)}")
        self.pool, self.sequences, self.new = pool, sequences, new

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v `[B, Hkv, T, D]` of new tokens; return what attention reads, tensors or (with `new`) `Paged`.

        Raises ValueError if the shape does not fit or the pool has too few blocks; then nothing is stored.
        """
        self.require_fitting(k, v)
        B, _, T, _ = k.shape
        if layer == 0:
            if self.new is None:
                self.pool.append(dict.fromkeys(self.sequences, T))
            self.counts = self.new or [T] * B
            pairs = zip(self.sequences, self.counts, strict=True)
            self.slots = torch.cat([self.pool.slots(*pair) for pair in pairs]).to(k.device)
            self.tables, self.lengths = self.pool.tables(self.sequences)
        pools = self.pool.k[layer], self.pool.v[layer]
        for pool, fresh in zip(pools, (k, v), strict=True):
            pool.flatten(0, 1)[self.slots] = fresh.transpose(1, 2).flatten(0, 1).to(pool.dtype)
        held = tuple(Paged(pool, self.tables, self.lengths, self.counts) for pool in pools)
        if self.new is None:
            held = tuple(pool[self.tables].flatten(1, 2)[:, : len(self)].transpose(1, 2) for pool in pools)
        return cast(tuple[Tensor, Tensor], held)

    def require_fitting(self, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless k and v are what this pass and this pool are for."""
        lengths = {self.pool.manager.lengths.get(sequence, 0) for sequence in self.sequences}
        if self.new is None and len(lengths) > 1:
            raise ValueError(f"rows without counts must be equally long, got {sorted(lengths)} positions")
        rows, tokens = (len(self.sequences), k.shape[2]) if self.new is None else (1, sum(self.new))
        expected = (rows, self.pool.k.shape[3], tokens, self.pool.k.shape[4])
        if k.shape != expected or v.shape != expected:
            raise ValueError(f"this cache takes {expected}, got k {tuple(k.shape)}, v {tuple(v.shape)}")

    def positions(self) -> Tensor:
        """Where the `new` tokens stand in their sequences: int64 `[sum]`, what the model wants as `positions`."""
        lengths = self.pool.manager.lengths
        ends = [lengths[sequence] for sequence in self.sequences]
        return torch.cat([torch.arange(end - n, end) for end, n in zip(ends, self.new or [0] * len(ends), strict=True)])

    def __len__(self) -> int:
        return self.pool.manager.lengths.get(self.sequences[0], 0)

    def truncate(self, length: int) -> None:
        """Forget everything past the first `length` positions. Raises ValueError if a sequence has fewer."""
        manager = self.pool.manager
        for sequence in [sequence for sequence in self.sequences if sequence in manager.tables]:
            manager.truncate(sequence, length)

    def nbytes(self) -> int:
        """Bytes of the blocks that these sequences own or share, each counted once."""
        tables = self.pool.manager.tables
        held = {block for sequence in self.sequences for block in tables.get(sequence, [])}
        return 2 * len(held) * self.pool.k[:, 0].nbytes


def paged_attention(q: Tensor, keys: Paged, values: Paged) -> Tensor:
    """Causal attention of packed queries `[tokens, H, D]` over their sequences' blocks; the same shape.

    On CUDA a pass of one token per sequence runs the kernel. Else the blocks of one sequence after the other are
    gathered, which costs a copy of them.
    """
    if q.is_cuda and max(keys.new) == 1 and q.dtype is not torch.float64:
        from kernels.attention.paged import paged_attention as kernel

        return kernel(q, keys.pool, values.pool, keys.tables, keys.lengths)
    size, out = keys.pool.shape[1], []
    for table, length, rows in zip(keys.tables, keys.lengths.tolist(), q.split(list(keys.new)), strict=True):
        used = table[: -(-length // size)]
        k, v = (half.pool[used].flatten(0, 1)[None, :length].transpose(1, 2) for half in (keys, values))
        out.append(causal_attention(rows.transpose(0, 1)[None], k.to(q.dtype), v.to(q.dtype))[0].transpose(0, 1))
    return torch.cat(out)


def attend(q: Tensor, k: Tensor | Paged, v: Tensor | Paged) -> Tensor:
    """The `attend` of a model that is served from a pool; over plain tensors it is the model's own."""
    if isinstance(k, Tensor) or isinstance(v, Tensor):
        return causal_attention(q, cast(Tensor, k), cast(Tensor, v))
    return paged_attention(q[0].transpose(0, 1).contiguous(), k, v).transpose(0, 1)[None]
