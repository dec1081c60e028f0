"""Sparse patterns: let each query see a few keys only, and visit no block of keys in which it sees none.

A pattern says whether the query at position i sees the key at position j. A few of them make up all the others:

    blockwise      −back <= ⌊j / b⌋ − ⌊i / b⌋ <= forward          blocks of b tokens
    window         |i − j| <= (w − 1) d, and d divides i − j      dilated by d; d = 1: local
    strided        l divides i − j
    summaries      j is one of c tokens at the end of its segment of l
    global tokens  i or j is one of them
    layout         whatever a table of blocks says; random blocks are such a table

`a | b` sees what either sees, `a & b` what both see, and `a & causal()` the past of a:

    Sparse Transformer   strided: window | strided        fixed: blockwise | summaries
    Longformer, ETC      window | global tokens
    BigBird              neighbouring blocks | global blocks | random blocks

A GPU multiplies tiles, so what costs time is not the pairs that are seen but the blocks that hold one. `BlockMask`
sorts them: dead ones are skipped, full ones need no mask, and only partial ones store one, of a bit for each pair.

Saves    4 D operations and, in slow memory, 4 D bytes of float16 keys and values over block_q, for each pair of a dead
         block. Local, Longformer and BigBird leave O(T) live blocks, Sparse Transformer O(T √T) with l = √T.
Costs    quality, where what is hidden was used: put into a model that was trained without, patterns hurt. And a stride
         has pairs in every block: all are live, until `stride_order` sorts the tokens (as OpenAI's code does).
Papers   Qiu et al. 2019, arXiv:1911.02972 (blockwise); Child et al. 2019, arXiv:1904.10509, section 4 (Sparse
         Transformer); Beltagy et al. 2020, arXiv:2004.05150, section 3 (Longformer); Ainslie et al. 2020,
         arXiv:2004.08483 (ETC); Zaheer et al. 2020, arXiv:2007.14062, section 2 (BigBird).
Follows  causal is aligned at the bottom right: query t of T is at position t + S − T. One that sees none gets out 0,
         lse −inf. Windows count the query itself: w is Mistral's W, and Longformer's W + 1. Lists as flex_attention.
Symbols  T queries, S keys; M masks, one for all heads or one for each; R = ⌈T / block_q⌉ and C = ⌈S / block_k⌉ blocks;
         q `[B, H, T, D]`, k, v `[B, Hkv, S, D]`, out like q, lse `[B, H, T]`, as in `chapters.attention.flash`.
Kernel   kernels/attention/patterns.py
"""

from __future__ import annotations

import argparse
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from chapters.attention.flash import absorb_tile, checked_scale, group_heads
from chapters.claims import Claim
from chapters.lab import Lab
from chapters.shared import block_masks
from chapters.shared.block_masks import BlockMask, Pattern, Visit, at_least, checked_masks, visible, visits
from chapters.shared.pattern_measures import draw, explained, perplexity_ratio, relative_costs
from minitfm.model import Attend


def causal() -> Pattern:
    """Keys up to the query's own position."""
    return Pattern(lambda i, j: j <= i)


def blockwise(size: int, back: int = 0, forward: int = 0) -> Pattern:
    """The query's own block of `size` tokens, `back` blocks before it and `forward` after it."""
    at_least(1, size=size)
    at_least(0, back=back, forward=forward)
    return Pattern(lambda i, j: (j // size >= i // size - back) & (j // size <= i // size + forward))


def window(size: int, dilation: int = 1) -> Pattern:
    """Sliding window: `size` keys on each side, the query itself counted with both, every `dilation`-th position.

    That is 2 size − 1 keys, and `size` of them once it is cut by `causal()`. Raises ValueError for a size or dilation
    below 1, TypeError for one that is no integer. Source: Longformer, section 3.1; Sparse Transformer, section 4.3.
    """
    at_least(1, size=size, dilation=dilation)
    return Pattern(lambda i, j: (abs(i - j) < size * dilation) & ((i - j) % dilation == 0))


def strided(stride: int) -> Pattern:
    """Every `stride`-th position, counted from the query."""
    at_least(1, stride=stride)
    return Pattern(lambda i, j: (i - j) % stride == 0)


def summaries(length: int, width: int = 1, shift: int = 0) -> Pattern:
    """The last `width` tokens of every segment of `length`; with `shift` the `shift`-th `width` tokens before those.

    Sparse Transformer gives each head another shift. Raises ValueError where they do not fit into a segment.
    """
    at_least(1, length=length, width=width)
    at_least(0, shift=shift)
    first = length - width * (shift + 1)
    if first < 0:
        raise ValueError(f"{shift + 1} times width {width} must fit into length {length}")
    return Pattern(lambda i, j: (j % length >= first) & (j % length < first + width))


def global_tokens(positions: Iterable[int]) -> Pattern:
    """Tokens that see everything and are seen by everything."""
    chosen = [operator.index(position) for position in positions]
    at_least(0, position=min(chosen, default=0))
    return Pattern(lambda i, j: np.isin(i, chosen) | np.isin(j, chosen))


def layout(size: int, grid: np.ndarray) -> Pattern:
    """Query block r sees key block c, of `size` tokens each, where grid[r, c]; beyond the grid nothing is seen."""
    at_least(1, size=size)
    if grid.ndim != 2 or grid.dtype != bool:
        raise ValueError(f"grid must be a bool matrix, got shape {grid.shape} of {grid.dtype}")
    padded = np.pad(grid, ((1, 1), (0, 1)))  # a margin of False before and after, to look up what lies beyond
    return Pattern(lambda i, j: padded[np.clip(i // size + 1, 0, len(grid) + 1), np.minimum(j // size, grid.shape[1])])


def random_blocks(taken: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """For each row of `taken` `[R, C]`, bool, `count` other columns drawn at random: bool `[R, C]`, True where drawn.

    Every choice of `count` among the columns that are not taken is equally likely, rows are independent of each other;
    where fewer are left, all of them are drawn. What is drawn for row r depends on taken[r], count, seed and r alone,
    so that a longer grid keeps the rows of a shorter one. taken stays as it is. Raises ValueError for a count below 0,
    or a taken that is no bool matrix. Source: BigBird, section 2 and appendix D.
    """
    at_least(0, count=count)
    if taken.ndim != 2 or taken.dtype != bool:
        raise ValueError(f"taken must be a bool matrix, got shape {taken.shape} of {taken.dtype}")
    drawn = np.zeros_like(taken)
    for row, free in enumerate(map(np.flatnonzero, ~taken)):
        generator = np.random.default_rng([seed, row])
        drawn[row, generator.choice(free, min(count, len(free)), replace=False)] = True
    return drawn


def bigbird(blocks: int, size: int, count: int = 1, seed: int = 0, past_only: bool = False) -> Pattern:
    """Neighbouring blocks of `size` tokens, the first and the last block for and from all, `count` random ones a row.

    `past_only`, for a model that is causal: no last block for all, random blocks from before the row's own.
    """
    ends = [0] if past_only else [0, blocks - 1]
    near = (blockwise(1, back=1, forward=1) | global_tokens(ends)).dense(blocks)
    future = np.triu(np.full_like(near, past_only), 1)
    return layout(size, near | random_blocks(near | future, count, seed))


def stride_order(n: int, stride: int) -> np.ndarray:
    """The order of n tokens, int64, in which those that a stride connects stand side by side."""
    return np.argsort(np.arange(n) % stride, kind="stable")


def methods(n: int, size: int, block: int, seed: int = 0, past_only: bool = True) -> dict[str, Pattern]:
    """The published patterns for n tokens; `size` tokens to a window, segment or stride, BigBird's blocks are `block`.

    past_only: cut by `causal()`.
    """
    few = range(max(size // 8, 1))
    every = {
        "full": layout(n, np.ones((1, 1), dtype=bool)),
        "blockwise": blockwise(size),
        "local": window(size),
        "dilated": window(size, dilation=2),
        "strided": window(size) | strided(size),
        "fixed": blockwise(size) | summaries(size, len(few)),
        "longformer": window(size) | global_tokens(few),
        "etc": window(max(size // 2, 1)) | global_tokens(range(max(size // 2, 1))),
        "bigbird": bigbird(-(-n // block), block, 1, seed, past_only),
    }
    return {name: pattern & causal() if past_only else pattern for name, pattern in every.items()}


def block_mask(
    masks: Pattern | np.ndarray | Sequence[Pattern | np.ndarray], T: int, S: int, block_q: int = 64, block_k: int = 64
) -> BlockMask:
    """Sort the blocks of T queries and S keys into dead, full and partial ones, and keep the masks of the partial ones.

    masks: a pattern or a bool array `[T, S]` for all heads, or a sequence with one for each head. T and S need not be
    multiples of the blocks; at no time are there more than block_q rows of a pattern in memory. A block is full if all
    of its block_q · block_k pairs are seen, partial if some are, and pairs past T or S count as not seen. Raises
    ValueError for sizes below 1, an array of another shape or no mask at all, TypeError for other kinds of masks and
    sizes that are no integers. Source: flex_attention's BlockMask.
    """
    masks = checked_masks(masks, T, S, block_q=block_q, block_k=block_k)
    partial = np.zeros((len(masks), -(-T // block_q), -(-S // block_k)), dtype=bool)
    full, tokens = partial.copy(), [np.zeros((0, block_q, block_k), dtype=bool)]
    for (head, mask), row in itertools.product(enumerate(masks), range(partial.shape[1])):
        rows = slice(row * block_q, min((row + 1) * block_q, T))
        seen = np.zeros((block_q, partial.shape[2] * block_k), dtype=bool)
        seen[: rows.stop - rows.start, :S] = visible(mask, rows, T, S)
        blocks = seen.reshape(block_q, -1, block_k).swapaxes(0, 1)  # [C, block_q, block_k]
        full[head, row] = blocks.all(axis=(1, 2))
        partial[head, row] = blocks.any(axis=(1, 2)) & ~full[head, row]
        tokens.append(blocks[partial[head, row]])
    return BlockMask((T, S), block_q, block_k, partial, full, np.concatenate(tokens))


def attend_row(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: BlockMask, head: int, row: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of the queries of one row of blocks, `[..., rows, D]` and `[..., rows]`, by the mask of one head.

    q `[..., rows, D]` are those queries alone, `block_q` of them or, in the last row, fewer; k, v `[..., S, D]` are all
    keys and values, their leading axes broadcast with q's. Blocks in `mask.partial[head, row]` are masked by
    `mask.tokens`, those in `mask.full[head, row]` are not masked, the keys and values of others are not looked at, be
    they NaN. A query that sees no key gets out 0 and lse −inf. Arguments stay as they are, dtypes too.
    Source: FlashAttention, section 3.3 and algorithm 5.
    """
    acc, S = np.zeros_like(q), k.shape[-2]
    total = np.zeros_like(acc[..., :1])
    maximum = np.full_like(total, -np.inf)
    for column in np.flatnonzero(mask.partial[head, row] | mask.full[head, row]):
        columns = slice(column * mask.block_k, min((column + 1) * mask.block_k, S))
        scores = scale * (q @ k[..., columns, :].swapaxes(-1, -2))
        if mask.partial[head, row, column]:
            seen = mask.tokens[mask.slots[head, row, column]]
            scores = np.where(seen[: q.shape[-2], : columns.stop - columns.start], scores, -np.inf)
        maximum, total, acc = absorb_tile(maximum, total, acc, scores, v[..., columns, :])
    total = np.where(total > 0, total, 1)
    return acc / total, (maximum + np.log(total))[..., 0]


def checked_mask(q, k, v, mask: BlockMask, scale: float | None) -> float:
    """The scale to use. Raises as flash's `checked_scale` does, and ValueError for a mask that does not fit q and k."""
    scale, lengths = checked_scale(q, k, v, scale), (q.shape[2], k.shape[2])
    if mask.shape != lengths or len(mask.full) not in (1, q.shape[1]):
        raise ValueError(
            f"mask must be for {lengths} queries and keys and one head or {q.shape[1]}, "
            f"got {mask.shape} and {len(mask.full)}"
        )
    return scale


def by_mask(q, k, v, mask: BlockMask) -> Iterator[tuple]:
    """(head, (q, k, v)) for each head of the mask: grouped arrays or tensors of all heads, or of its own alone."""
    if len(mask.full) == 1:
        yield 0, group_heads(q, k, v)
        return
    for head in range(q.shape[1]):
        shared = slice(head * k.shape[1] // q.shape[1], head * k.shape[1] // q.shape[1] + 1)
        yield head, group_heads(q[:, head : head + 1], k[:, shared], v[:, shared])


def block_sparse_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: BlockMask, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over the pairs that `mask` sees, by its live blocks: out `[B, H, T, D]` and lse `[B, H, T]`.

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]`; float32 or float64; scale 1/√D if None. Dead blocks are not read. Raises
    ValueError and TypeError as flash attention does, and ValueError for a mask that does not fit q and k.
    """
    scale = checked_mask(q, k, v, mask, scale)
    heads = []
    for head, (queries, keys, values) in by_mask(q, k, v, mask):
        rows = enumerate(mask.rows())
        parts = [attend_row(queries[..., at, :], keys, values, mask, head, row, scale) for row, at in rows]
        heads.append([np.concatenate(x, axis=3) for x in zip(*parts, strict=True)])  # out and lse
    out, lse = (np.concatenate(x, axis=1) for x in zip(*heads, strict=True))
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float | None = None,
    plan: list[list[Visit]] | None = None,
) -> Tensor:
    """`block_sparse_attention` in torch: out alone, differentiable, gradients 0 where a query sees nothing.

    plan: `visits(mask)`, for a mask that is used again. float16 and bfloat16 are summed in float32.
    """
    scale, plan = checked_mask(q, k, v, mask, scale), plan or visits(mask)
    precise = torch.promote_types(q.dtype, torch.float32)
    grouped = by_mask(q.to(precise), k.to(precise), v.to(precise), mask)
    parts = [block_masks.attend_visits(qs, ks, vs, plan[head], scale) for head, (qs, ks, vs) in grouped]
    return torch.cat(parts, dim=1).reshape(q.shape).to(q.dtype)


def sparse_attend(pattern: Pattern, block: int = 64) -> Attend:
    """Attention by the causal part of a pattern, for `Transformer(config, attend=…)`; on CUDA by the kernel.

    Masks are made once for each T and S, in blocks of `block` (on CUDA 16, 32, 64 or 128).
    """
    at_least(1, block=block)

    @lru_cache(maxsize=64)
    def prepared(T: int, S: int, device: torch.device) -> tuple:
        mask = block_mask(pattern & causal(), T, S, block, block)
        if device.type != "cuda":
            return mask, visits(mask)
        from kernels.shared.block_lists import on_device

        return (on_device(mask, device),)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, *plan = prepared(q.shape[2], k.shape[2], q.device)
        if not q.is_cuda:
            return sparse_attention(q, k, v, mask, None, *plan)
        from kernels.attention.patterns import block_sparse_attention as kernel

        return kernel(q, k, v, mask)[0]

    return attend


def options(parser) -> None:
    """Options of `python -m chapters run patterns`."""
    parser.add_argument("--pattern", choices=methods(1, 1, 1), default="bigbird", help="default bigbird")
    parser.add_argument("--window", type=int, default=32, help="tokens of a window, segment or stride (default 32)")
    parser.add_argument("--block", type=int, default=16, help="tokens of a block (default 16)")


def seams(args: argparse.Namespace) -> dict[str, Attend]:
    """What `python -m chapters run patterns` puts into the model; --seed draws the random blocks."""
    at_least(1, window=args.window, block=args.block)
    return {"attend": sparse_attend(methods(4096, args.window, args.block, args.seed)[args.pattern], args.block)}


def trials(n: int, block: int) -> dict[str, tuple[Attend, BlockMask]]:
    """Every method with windows of 64 and 256, and a bare stride of 64, as it is and with sorted tokens."""
    tried = {f"{name}, {size}": pattern for size in (64, 256) for name, pattern in methods(n, size, block).items()}
    bare = strided(64) & causal()
    tried |= {"stride alone": bare, "stride, sorted": bare.reordered(stride_order(n, 64))}
    return {name: (sparse_attend(x, block), block_mask(x, n, n, block, block)) for name, x in tried.items()}


def claim(lab: Lab) -> Claim:
    """Time follows the live blocks, not the pairs that are seen; and what patterns cost a model trained without.

    Holds if the share of live blocks explains 95% of the variance of time, and the share of pairs less of it.
    """
    n, block, size = 2048, 64, 32
    shares = relative_costs(trials(n, block), n, repeats=7 if lab.full else 3)
    fit = {key: explained(shares, key) for key in ("blocks", "pairs")}
    worse = {}
    for name in [name for name in methods(n, size, 16) if name != "full"]:
        seeds = lab.seeds if name == "bigbird" else lab.seeds[:1]
        attends = [sparse_attend(methods(lab.length, size, 16, seed)[name], 16) for seed in seeds]
        worse[name] = perplexity_ratio(lab, attends, sequences=256 if lab.full else 32)
    numbers = {f"share of time explained by {key}": value for key, value in fit.items()}
    numbers |= {f"{what}, {name}": found[what] for name, found in shares.items() for what in ("time", "blocks")}
    numbers |= {f"perplexity ratio, {name}": value for name, value in worse.items()}
    best, worst = min(worse, key=worse.__getitem__), max(worse, key=worse.__getitem__)
    alone, after = shares["stride alone"], shares["stride, sorted"]
    sentence = (
        f"Live blocks explain {fit['blocks']:.0%} of the variance of time, pairs that are seen {fit['pairs']:.0%}: a "
        f"stride of 64 sees {alone['pairs']:.0%} of causal attention's pairs, visits {alone['blocks']:.0%} of its "
        f"blocks and takes {alone['time']:.0%} of its time, and {after['time']:.0%} once its tokens are sorted; put "
        f"into the base model without training, patterns of {size} tokens multiply perplexity by {worse[best]:.2f} "
        f"({best}) to {worse[worst]:.2f} ({worst})."
    )
    holds = fit["blocks"] > max(0.95, fit["pairs"])
    setting = f"{n} tokens in blocks of {block}, torch on the CPU; model: {lab.length} tokens; seeds {lab.seeds}"
    return Claim(sentence, holds, numbers, draw(shares, worse), setting)
