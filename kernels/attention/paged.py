"""Paged decode attention in Triton: each new token attends to keys and values that lie in blocks, found by a table.

Fused: the look-up of blocks, Q Kᵀ, softmax, the product with V. One token does two operations with each number that it
reads, so that reading the blocks of its sequence is all the time it takes.

    bytes        2 e S Hkv D  +  4 ⌈S / B⌉  +  2 e H D      per sequence: its blocks, table, q and out; e bytes a number
    operations   4 H S D                                    floor: bytes / bandwidth
Replaces the gathering of each sequence's blocks and attention over the copy, which moves 6 e S Hkv D bytes: blocks
read, the copy written, the copy read; for sequences of different lengths also what they are filled up with.

One program       a key/value head of a sequence and a share of its positions, for all H / Hkv query heads that read it:
                  they are the rows of one tensor-core product, padded to 16, so that no key is read twice. Running
                  maximum and sums as in FlashAttention.
A tile            is BLOCK positions, whatever the block size: each looks up its own block, a load of 4 bytes that its
                  neighbours find in the cache, and then reads D numbers in a row. A table is read no further than its
                  sequence is long, and a block no further than it is filled.
Shares            a batch of few sequences would leave most of the GPU idle, so positions are cut into 1 to 64 shares
                  until there are two programs per multiprocessor or so; how many depends on shapes alone. Each writes
                  its normalised output and the log of its sum in float32, and `combine_kernel` weighs them, always in
                  the same order: 8 (D + 1) bytes per share and query head.
Bad tables        cannot be refused, because looking at them would wait for the GPU. A block id that is none, a length
                  over the table's and a length below 1 read nothing astray, and make the output of that sequence NaN.

Layout: q, out [N, H, D]; keys, values [blocks, B, Hkv, D], B from 1 up; tables [N, width] and lengths [N] int32. Query
head h reads head h // (H / Hkv). Scores are kept in base 2: `scale2` = scale log2(e).
Method: Kwon et al. 2023, arXiv:2309.06180, section 5.1; shares of Flash-Decoding (Dao et al. 2023),
pytorch.org/blog/flash-decoding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.shared.attentions import DTYPES
from kernels.shared.shares import combine_kernel

LOG2E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)


@triton.jit
def find_rows(table_ptr, start, length, width, blocks, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """(row, inside, known), [BLOCK] each, of positions start .. start + BLOCK of one sequence.

    row is int64, the position's place among all positions of the pool; inside: it is before `length`; known: and its
    block is one of `blocks`. Where it is not known, row may be anything.
    """
    position = start + tl.arange(0, BLOCK)
    inside, page = position < length, position // PAGE
    block = tl.load(table_ptr + page, mask=inside & (page < width), other=-1)
    known = (block >= 0) & (block < blocks)
    return block.to(tl.int64) * PAGE + position % PAGE, inside, known


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, out_ptr, lse_ptr, width, blocks, group, scale2,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: sequence program_id(0), the `group` query heads that read head program_id(1), share program_id(2).

    q is [N, Hkv, group, D]. out [N, Hkv, group, shares, D] is each share's softmax-weighted mean of values, and lse [N,
    Hkv, group, shares] the base-2 log of the sum of its exp2(score), with scores q kᵀ scale2. A share is a run of whole
    tiles of BLOCK positions; one without any leaves NaN, and an lse of -inf. Sums are float32; weights meet values in
    the dtype of those. A position inside `length` whose block is not known scores inf, which makes everything NaN.
    """
    sequence, head, share = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads, shares = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(length_ptr + sequence)
    member, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    query, live = (sequence * kv_heads + head) * group + member, (member < group)[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + query[:, None] * D + column[None, :], mask=live, other=0.0)
    maximum = tl.full((BLOCK_H,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    tiles = tl.cdiv(length, BLOCK)
    for start in range(share * tiles // shares * BLOCK, (share + 1) * tiles // shares * BLOCK, BLOCK):
        row, inside, known = find_rows(table_ptr + sequence * width, start, length, width, blocks, PAGE, BLOCK)
        address = (row * kv_heads + head)[:, None] * D + column[None, :]
        readable = known[:, None] & (column < D)[None, :]
        k = tl.load(k_ptr + address, mask=readable, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        scores = tl.where(known[None, :], scores, tl.where(inside, INFINITY, -INFINITY)[None, :])
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # each tile has a position: finite
        weights, rescale = tl.exp2(scores - new_maximum[:, None]), tl.exp2(maximum - new_maximum)
        v = tl.load(v_ptr + address, mask=readable, other=0.0)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    place = query * shares + share
    tl.store(out_ptr + place[:, None] * D + column[None, :], out, mask=live)
    tl.store(lse_ptr + place, maximum + tl.log2(total), mask=member < group)


def configuration(heads: int, capacity: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Positions of a tile, and shares: 1 to 64, until two programs run on each of 132 multiprocessors.

    heads: those of keys, of all sequences; capacity: the positions that a table has room for, which stand in for the
    lengths: nobody here knows them. More than one share only where each of a full table has at least two tiles.
    """
    block, shares = 32 if dtype is torch.float32 else 64, 1
    while heads * shares < 264 and shares < 64 and triton.cdiv(capacity, block) >= 4 * shares:
        shares *= 2
    return {"block": block, "shares": shares}


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float | None = None, **blocks: int
) -> Tensor:
    """softmax(q kᵀ scale) v of one new token per sequence over its own blocks: `[N, H, D]` in q's dtype.

    q        `[N, H, D]` float16, bfloat16 or float32 (IEEE products, slow: for tests), contiguous; D up to 256
    keys     `[blocks, B, Hkv, D]` in the dtype of q, contiguous, and so are values; Hkv divides H
    tables   `[N, width]` int32, contiguous: position j of sequence n is slot j % B of block tables[n, j // B]. What
             lies past the last block is not read
    lengths  `[N]` int32, from 1 to width · B, the new token's position included
    scale    of the scores; None: 1 / √D
    blocks   parts of `configuration` to replace: block, a power of two of at least 16, and shares, at least 1

    Raises ValueError or TypeError for tensors that do not fit. Tables and lengths are not looked at: where they are
    wrong, rows are NaN.
    """
    _check(q, keys, values, tables, lengths)
    (N, H, D), (count, page, Hkv, _) = q.shape, keys.shape
    chosen = configuration(N * Hkv, tables.shape[1] * page, q.dtype) | blocks
    block, shares = chosen["block"], chosen["shares"]
    require(block >= 16 and block & (block - 1) == 0, f"block must be a power of two of at least 16, got {block}")
    require(shares >= 1, f"shares must be at least 1, got {shares}")
    out = torch.empty_like(q)
    partial = out if shares == 1 else torch.empty((N * H, shares, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((N * H, shares), dtype=torch.float32, device=q.device)
    meta = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D))}
    decode_kernel[(N, Hkv, shares)](
        q, keys, values, tables, lengths, partial, lse, tables.shape[1], count, H // Hkv,
        (D**-0.5 if scale is None else scale) * LOG2E.value, PAGE=page,
        BLOCK_H=max(16, triton.next_power_of_2(H // Hkv)), BLOCK=block, num_warps=4, num_stages=3, **meta,
    )  # fmt: skip
    if shares > 1:
        combine_kernel[(N * H,)](partial, lse, out, shares, SHARES=triton.next_power_of_2(shares), **meta)
    return out


def _check(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> None:
    """Raise what `paged_attention` promises."""
    require(q.dim() == 3 and q.numel() > 0, f"q must be [N, H, D] and not empty, got {tuple(q.shape)}")
    N, H, D = q.shape
    shape = tuple(keys.shape)
    fits = len(shape) == 4 and 0 not in shape and shape[3] == D and H % shape[2] == 0
    require(fits, f"keys must be [blocks, B, Hkv, {D}] with Hkv dividing {H}, got {shape}")
    require(values.shape == keys.shape, f"values must be {shape} as keys, got {tuple(values.shape)}")
    require(D <= 256, f"the head size D must be at most 256, got {D}")
    fits = tables.dim() == 2 and tables.shape[0] == N and tables.shape[1] > 0
    require(fits, f"tables must be [{N}, width], got {tuple(tables.shape)}")
    require(tuple(lengths.shape) == (N,), f"lengths must be [{N}], got {tuple(lengths.shape)}")
    require_dtype(DTYPES, q=q)
    require_dtype((q.dtype,), keys=keys, values=values)
    require_dtype((torch.int32,), tables=tables, lengths=lengths)
    tensors = {"q": q, "keys": keys, "values": values, "tables": tables, "lengths": lengths}
    require_contiguous(**tensors)
    require_launchable(**tensors)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one token over contiguous keys and values `[N, Hkv, S, D]`, by torch's own operator."""
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=q.shape[1] != k.shape[1])[:, :, 0]


def gathered(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Arguments of `sdpa`, for sequences that all fill their tables."""
    return q, *(pool[tables].flatten(1, 2).transpose(1, 2) for pool in (keys, values))


def gather_and_attend(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """What the kernel replaces."""
    return sdpa(*gathered(q, keys, values, tables, lengths))


def decode_case(name: str, N: int, heads: int, kv_heads: int, length: int, page: int) -> Case:
    """One token of each of N sequences in a layer of Llama, D = 128, their blocks scattered over the pool."""

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        make = torch.empty if device.type == "cpu" else torch.randn
        width = length // page
        q = make((N, heads, 128), dtype=torch.bfloat16, device=device)
        pools = (make((N * width, page, kv_heads, 128), dtype=torch.bfloat16, device=device) for _ in "kv")
        tables = torch.randperm(N * width, device=device).view(N, width).int()
        return q, *pools, tables, torch.full((N,), length, dtype=torch.int32, device=device)

    return Case(
        name,
        inputs=inputs,
        run=paged_attention,
        expected=gather_and_attend,
        bytes=4 * N * length * kv_heads * 128 + 4 * N * (length // page) + 4 * N * heads * 128,
        operations=4 * N * heads * length * 128,
        kind="stream",
        peers={"SDPA, contiguous cache": sdpa, "gather, then SDPA": gather_and_attend},
        prepare={"SDPA, contiguous cache": gathered},
    )


CASES = [
    decode_case("8B, 1 x 8192, blocks of 16", 1, 32, 8, 8192, 16),
    decode_case("8B, 16 x 8192, blocks of 16", 16, 32, 8, 8192, 16),
    decode_case("8B, 16 x 8192, blocks of 128", 16, 32, 8, 8192, 128),
    decode_case("7B, 16 x 4096, blocks of 32", 16, 32, 32, 4096, 32),
]
