"""PagedAttention: keep keys and values in blocks that lie anywhere, found by a table, as operating systems page memory.

Nobody knows how long an answer will be. A cache that must be contiguous reserves the longest for everyone, and most of
it stays empty. Here memory is cut into blocks of B positions, and a sequence owns a list of them, its table:

    position j of a sequence lies in block table[j // B], slot j % B,      a sequence of n positions owns ⌈n / B⌉ blocks

so what it does not use is less than one block. Attention reads through the table, and otherwise is what it was. As a
page can be mapped twice, a block can stand in two tables: two sequences with a common beginning hold it once. A block
counts its owners, and who writes in one that has others copies it first (copy on write).

Saves    memory: (B − 1) / 2 positions of a sequence are empty on average, whatever its length, where reserving L leaves
         L − n. More sequences fit, so a step, whose time is that of reading the weights, brings more tokens. Exact.
Costs    one table entry, 4 bytes, read per block; smaller pieces of memory; a scheduler, because the pool can run out.
Paper    Kwon, Li, Zhuang, Sheng, Zheng, Yu, Gonzalez, Zhang, Stoica: Efficient Memory Management for Large Language
         Model Serving with PagedAttention, SOSP 2023, arXiv:2309.06180, sections 4.1 to 4.5.
Follows  vLLM 0.4.2: the block freed last is taken first; the last owner of a block writes in place; a full block is
         never copied; a request is let in if a share of the pool, the watermark, stays free. A block is laid out as by
         flash-attn, `[B, Hkv, D]`. Prefixes are shared by fork, not found by their hash once their owners are gone.
Symbols  B block_size; N sequences; S = lengths[n] positions; H query heads; Hkv key heads, query head h reads key head
         h // (H / Hkv); D head size. q, out `[tokens, H, D]`; keys, values `[blocks, B, Hkv, D]`; tables `[N, width]`.
Cache    chapters/shared: paged_cache.py, `Pool`, and `PagedCache` behind the `cache` of minitfm; serving.py, scheduler
Kernel   kernels/attention/paged.py, for decoding
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from chapters.claims import Claim
from chapters.figures import figure, legend, series
from chapters.lab import Lab
from chapters.shared.paged_cache import Pool, attend
from chapters.shared.serving import Request, Step, draw_requests, reserved_waste, serve, waste
from minitfm.generate import generate


def append_tokens(manager: BlockManager, sequence: int, count: int = 1) -> list[tuple[int, int]]:
    """Make room for `count` more positions; returns the copies (from block, to block) due before they are written.

    Where the last block is not full and has other owners, the sequence gives it up for a new one, and its contents are
    to be copied: the only copy there ever is. The last owner of a block keeps it. Then new blocks follow until there is
    room. Blocks come from `manager.take`, a copy's before the others. `manager.needed` says how many it will be.
    Raises ValueError for an unknown sequence, a count below 1, and if not enough blocks are free: then nothing changes.
    Source: section 4.4; vLLM, `append_slot`, which is this for one position.
    """
    needed, free = manager.needed(sequence, count), len(manager.free_blocks)
    if sequence not in manager.tables or needed > free:
        raise ValueError(
            f"need a known sequence and {needed} blocks for {count} more positions; got {sequence}, {free} free"
        )
    table, copies = manager.tables[sequence], []
    if manager.lengths[sequence] % manager.block_size and manager.owners[table[-1]] > 1:
        shared, table[-1] = table[-1], manager.take()
        manager.release(shared)
        copies.append((shared, table[-1]))
    manager.lengths[sequence] += count
    while len(table) * manager.block_size < manager.lengths[sequence]:
        table.append(manager.take())
    return copies


def fork_sequence(manager: BlockManager, parent: int, child: int, length: int | None = None) -> None:
    """Begin the sequence `child` with the first `length` positions of `parent`, all for None, in the same blocks.

    No block is taken or copied: those that hold the positions, the last perhaps in part, have one owner more. Tables
    are lists of their own. Raises ValueError for an unknown parent, a child that exists, and a length that is not from
    1 to the parent's: then nothing changes. Source: section 4.4.
    """
    held = manager.lengths.get(parent, 0)
    length = held if length is None else length
    if child in manager.tables or not 1 <= length <= held:
        raise ValueError(f"need a new child and 1 .. {held} positions of parent {parent}, got {child}, {length}")
    manager.tables[child] = manager.tables[parent][: manager.blocks_for(length)]
    manager.lengths[child] = length
    for block in manager.tables[child]:
        manager.owners[block] += 1


def free_sequence(manager: BlockManager, sequence: int) -> None:
    """Forget a sequence and release its blocks, in the order of its table; those of others stay.

    Raises ValueError for a sequence that is not there, such as one that is freed a second time; then nothing changes.
    """
    if sequence not in manager.tables:
        raise ValueError(f"sequence {sequence} is not there, or was freed already")
    for block in manager.tables.pop(sequence):
        manager.release(block)
    del manager.lengths[sequence]


class BlockManager:
    """Which sequence owns which of `blocks` blocks of `block_size` positions. Ids only: the memory is elsewhere.

    free_blocks  a stack: the last is taken next, at first the highest
    owners       of each block, how many tables it stands in: 0 if free
    tables       {sequence: its blocks in order}
    lengths      {sequence: positions}
    Letting a sequence in must leave `watermark · blocks` blocks free, rounded down, for those that grow meanwhile.
    Raises ValueError for sizes below 1 and a watermark outside of [0, 1).
    """

    def __init__(self, blocks: int, block_size: int, watermark: float = 0.0) -> None:
        if blocks < 1 or block_size < 1 or not 0 <= watermark < 1:
            raise ValueError(
                f"need blocks, block_size >= 1, 0 <= watermark < 1; got {blocks}, {block_size}, {watermark}"
            )
        self.blocks, self.block_size, self.reserve = blocks, block_size, int(watermark * blocks)
        self.free_blocks, self.owners = list(range(blocks)), [0] * blocks
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    append, fork, free = append_tokens, fork_sequence, free_sequence

    def blocks_for(self, length: int) -> int:
        """⌈length / block_size⌉."""
        return -(-length // self.block_size)

    def take(self) -> int:
        """A free block, now with one owner."""
        block = self.free_blocks.pop()
        self.owners[block] = 1
        return block

    def release(self, block: int) -> None:
        """One owner less; without any, the block is free. Raises ValueError if it is already."""
        if self.owners[block] == 0:
            raise ValueError(f"block {block} is free already")
        self.owners[block] -= 1
        if self.owners[block] == 0:
            self.free_blocks.append(block)

    def can_allocate(self, length: int, shared: int = 0) -> Literal["now", "later", "never"]:
        """Whether a new sequence, `shared` of whose blocks are there, can be let in; later is when others are gone."""
        needed = self.blocks_for(length)
        if self.blocks - needed < self.reserve:
            return "never"
        return "now" if len(self.free_blocks) - (needed - shared) >= self.reserve else "later"

    def allocate(self, sequence: int, length: int) -> None:
        """Begin a sequence. ValueError if it exists, is empty, or finds too few blocks: then nothing changes."""
        if sequence in self.tables or length < 1 or self.blocks_for(length) > len(self.free_blocks):
            raise ValueError(
                f"need a new sequence of at least 1 position, for which {len(self.free_blocks)} free blocks of "
                f"{self.block_size} suffice; got {sequence}, {length}"
            )
        self.tables[sequence], self.lengths[sequence] = [], 0
        self.append(sequence, length)

    def needed(self, sequence: int, count: int = 1) -> int:
        """How many blocks `append` would take, or `allocate` if the sequence is not there. ValueError for count < 1."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        table, length = self.tables.get(sequence, []), self.lengths.get(sequence, 0)
        copied = length % self.block_size > 0 and self.owners[table[-1]] > 1
        return self.blocks_for(length + count) - len(table) + copied

    def can_append(self, sequence: int, count: int = 1) -> bool:
        """Whether `append` would find its blocks."""
        return self.needed(sequence, count) <= len(self.free_blocks)

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` positions. ValueError for a sequence not there or shorter: then nothing changes."""
        if not 0 <= length <= self.lengths.get(sequence, -1):
            raise ValueError(f"cannot truncate sequence {sequence} to {length}: {self.lengths.get(sequence)} held")
        keep = self.blocks_for(length)
        for block in self.tables[sequence][keep:]:
            self.release(block)
        del self.tables[sequence][keep:]
        self.lengths[sequence] = length


def paged_attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tables: np.ndarray,
    lengths: np.ndarray,
    scale: float | None = None,
    new: np.ndarray | None = None,
) -> np.ndarray:
    """softmax(q kᵀ scale) v of each sequence over its own blocks: q `[tokens, H, D]` -> float64 `[tokens, H, D]`.

    keys and values `[blocks, B, Hkv, D]` are all blocks of all sequences. Sequence n has lengths[n] positions, the new
    ones included; position j is slot j % B of block tables[n, j // B]. Table entries past the last block and slots past
    the last position may hold anything and are not read. The queries of sequence n are the next new[n] rows of q, its
    newest positions in order, each of which sees those up to itself: 1 decodes (all, for None), lengths[n] prefills,
    and both may stand in one call. Query head h reads head h // (H / Hkv); scale is 1 / √D if None. All is computed in
    float64, arguments stay as they are. Raises ValueError if shapes do not fit, a length is below 1 or over the table,
    new[n] is not from 1 to lengths[n], the rows of q are not as many as all new, or a block id that is to be read is
    not one. Source: section 4.1, equation 4; mixed passes as in vLLM.
    """
    new = np.ones(len(lengths), int) if new is None else new
    require_fitting(q, keys, values, tables, lengths, new)
    (_, H, D), (_, size, Hkv, _) = q.shape, keys.shape
    out, scale = np.empty(q.shape), 1 / np.sqrt(D) if scale is None else scale
    for table, length, count, end in zip(tables, lengths, new, np.cumsum(new), strict=True):
        used = table[: -(-length // size)]
        k, v = (pool[used].reshape(-1, Hkv, D)[:length].astype(np.float64) for pool in (keys, values))  # [S, Hkv, D]
        queries = q[end - count : end].reshape(count, Hkv, H // Hkv, D)
        scores = scale * np.einsum("thgd,shd->hgts", queries, k)
        hidden = np.arange(length) > np.arange(length - count, length)[:, None]
        scores = np.where(hidden, -np.inf, scores)  # each query sees itself: the maximum is finite
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[end - count : end] = np.einsum("hgts,shd->thgd", weights, v).reshape(count, H, D)
    return out


def require_fitting(q, keys, values, tables, lengths, new) -> None:
    """Raise ValueError for what `paged_attention` refuses."""
    if q.ndim != 3 or keys.ndim != 4 or keys.shape != values.shape or 0 in (*q.shape, *keys.shape):
        raise ValueError(
            f"q must be [tokens, H, D], keys and values alike; got {q.shape}, {keys.shape}, {values.shape}"
        )
    (rows, H, D), (blocks, size, Hkv, depth) = q.shape, keys.shape
    if depth != D or H % Hkv or tables.ndim != 2 or not len(tables) == len(lengths) == len(new):
        raise ValueError(
            f"q {q.shape} and blocks {keys.shape} must share D, Hkv dividing H, with a table, a length and a count for "
            f"each sequence; got {tables.shape}, {len(lengths)}, {len(new)}"
        )
    if lengths.min() < 1 or lengths.max() > tables.shape[1] * size:
        raise ValueError(f"lengths must be from 1 to {tables.shape[1] * size}, got {lengths.tolist()}")
    if np.min(new) < 1 or (new > lengths).any() or np.sum(new) != rows:
        raise ValueError(
            f"new must be from 1 to lengths and sum to the {rows} rows of q, got {np.asarray(new).tolist()}"
        )
    read = tables[np.arange(tables.shape[1]) * size < lengths[:, None]]
    if read.min() < 0 or read.max() >= blocks:
        raise ValueError(f"block ids must be from 0 to {blocks - 1}, got {read.min()} to {read.max()}")


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run paged`."""
    parser.add_argument("--requests", type=int, default=24, metavar="N", help="how many to serve (default 24)")
    parser.add_argument("--blocks", type=int, default=96, metavar="N", help="blocks of the pool (default 96)")
    parser.add_argument("--block-size", type=int, default=16, metavar="B", help="positions of a block (default 16)")
    parser.add_argument("--share", action="store_true", help="give all one beginning, and hold it once")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float | str]:
    """Serve many requests from one pool; how full it was, what had to be done twice, and whether a token differs."""
    if args.requests < 1:
        raise ValueError(f"--requests must be at least 1, got {args.requests}")
    steps, different, requests = run(lab, args.seed, args.requests, args.blocks, args.block_size, args.share)
    return {
        "passes of the model": len(steps),
        "tokens of answers": sum(request.count for request in requests),
        "sequences at a time": float(np.mean([step.sequences for step in steps])),
        "part of the blocks in use that is empty": waste(steps, args.block_size),
        "part that would be, each reserving the context": reserved_waste(steps, lab.config.context),
        "sent back for want of blocks": sum(step.preempted for step in steps),
        "tokens that differ from generating alone": different,
        "an answer": lab.tokenizer.decode(requests[0].tokens()),
    }


def run(
    lab: Lab, seed: int, count: int, blocks: int, block_size: int, share: bool = False
) -> tuple[list[Step], int, list[Request]]:
    """(passes, tokens that differ from generating each alone, requests), in float64: rounding shall not decide."""
    requests, plain = draw_requests(lab, seed, count, share), lab.model().double()
    manager = BlockManager(blocks, block_size, watermark=0.01)
    steps = serve(lab.model(attend=attend).double(), Pool(lab.config, manager, torch.float64), requests, share)
    different = 0
    for request in requests:
        alone = generate(plain, torch.tensor([request.prompt]), request.count, temperature=request.temperature,
                         seed=request.seed)[0].tolist()  # fmt: skip
        different += sum(a != b for a, b in zip(alone, request.tokens(), strict=True))
    return steps, different, requests


def picture(steps: Sequence[Step], context: int, pool: int, block_size: int) -> Figure:
    """What the passes of one run held, and what reserving would have taken."""
    fig, axes = figure()
    lines = {"reserved, a context each": ("baseline", [step.sequences * context for step in steps])}
    lines |= {"in blocks": ("method", [step.blocks * block_size for step in steps])}
    lines |= {"held": ("accent", [step.positions for step in steps])}
    for label, (role, heights) in lines.items():
        axes.plot(heights, **series(role), markevery=50, label=label)
    axes.axhline(pool, color="0.6", linewidth=0.8)
    axes.set(xlabel="pass of the model", ylabel="positions", yscale="log")
    axes.text(0, pool, "all of the pool", va="bottom", fontsize=8)
    legend(axes)
    return fig


def measure(steps: Sequence[Step], forked: Sequence[Step], size: int, context: int) -> dict[str, float]:
    """What the passes of all runs, and of those with forks, say about blocks of `size` and about whole contexts."""
    spare = [(step.blocks * size - step.positions) / step.sequences for step in steps]
    return {
        "part empty, blocks": waste(steps, size),
        "part empty, contexts reserved": reserved_waste(steps, context),
        "empty positions of a sequence": float(np.mean(spare)),
        "empty positions of a sequence, worst pass": max(spare),
        "sequences at a time, blocks": float(np.mean([step.sequences for step in steps])),
        "blocks saved by forks": 1 - sum(step.blocks for step in forked) / sum(step.apart for step in forked),
        "sent back": sum(step.preempted for step in steps),
    }


def claim(lab: Lab) -> Claim:
    """Blocks waste less than one per sequence where reserving wastes most of the memory, and no token changes."""
    count, blocks, size, context = 24, 64, 16, lab.config.context
    runs = [run(lab, seed, count, blocks, size)[:2] for seed in lab.seeds]
    sharing = [run(lab, seed, count // 3, blocks, size, share=True)[:2] for seed in lab.seeds]
    steps, forked = ([step for found, _ in way for step in found] for way in (runs, sharing))
    different, room = sum(found[1] for found in runs + sharing), blocks * size // context
    numbers = measure(steps, forked, size, context) | {"tokens that differ from generating alone": different}
    empty, reserved, spare, worst, together, saved, sent_back, _ = numbers.values()
    sentence = (
        f"Of the memory of running sequences {empty:.0%} is empty in blocks of {size}, {spare:.1f} positions of each, "
        f"and {reserved:.0%} if each reserves the whole context: in one pool {together:.1f} sequences run at a time "
        f"instead of {room}. {different} tokens differ from generating alone, though requests had to start again "
        f"{sent_back} times; {context // 12} first tokens in common, held once, save {saved:.0%} of the blocks."
    )
    holds = different == 0 and worst < size and empty < 0.2 < 0.6 < reserved and together > room and saved > 0.05
    setting = (
        f"{count} requests, lengths exponential with ShareGPT's means scaled to a context of {context} and cut at half "
        f"of it, {blocks} blocks, greedy; {count // 3} that begin alike, drawn; float64, seeds {lab.seeds}"
    )
    return Claim(sentence, holds, numbers, picture(runs[0][0], context, blocks * size, size), setting)
