"""Flash-Decoding in Triton: one new token's attention, its keys shared out over the GPU; and products of a few rows.

`flash_decoding` reads each key and value once; one query per head does two operations with each number read, so that
reading them is all the time it takes, if all multiprocessors read.

    bytes        2 e B Hkv S D  +  2 e B H D  +  4 B H       e bytes a number: keys, values; q, out; lse
    operations   4 B H S D                                   floor: bytes / bandwidth
Replaces a program per query head, of which those that share keys each read them: H / Hkv times the bytes, by B H
multiprocessors at the most; and attention as three operators, which moves 16 B H S bytes of scores more.

One program       a key/value head and a run of its positions, for all H / Hkv query heads that read it: they are the
                  rows of one tensor-core product, padded to 16. Running maximum and sums as in FlashAttention.
Splits            positions are cut into 1 to 64 runs of whole tiles, none empty. Each leaves its normalised output and
                  the log of its sum in float32, and `combine_kernel` weighs them, always in the same order, so that two
                  calls give the same bits: 8 (D + 1) bytes more per split and query head.

`flat_matmul` is x weightᵀ for at most 16 rows of x. It does 2 M operations with each weight, and so waits for memory:

    bytes        e (N K + M K + M N)                         operations   2 M N K
One program       BLOCK_N rows of the weight, all of K, each read once; x, padded to 16 rows and not to 64 as tiles of
                  large products are, comes from the cache. The weight is K-major, as nn.Linear keeps it: loads of 128
                  bits, several tiles under way at a time. It is the left operand, so that rows of x are columns.
                  N is cut so finely that there are programs for the whole GPU.

Layout: q, out [B, H, 1, D], contiguous; k, v [B, Hkv, S, D] anywhere in memory, last axis contiguous; lse [B, H, 1]
float32, natural logarithm. x [M, K], weight [N, K], contiguous. Scores are in base 2: `scale2` = scale log2(e).
Method: Dao et al. 2023, pytorch.org/blog/flash-decoding; Hong et al. 2023, arXiv:2311.01282, section 4.
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
from kernels.shared.attentions import DTYPES, checked_scale
from kernels.shared.tiles import head_start, load_tile

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
INFINITY = tl.constexpr(math.inf)
MOST_SPLITS = 64
FLAT_ROWS = 16


@triton.jit(do_not_specialize=["group"])  # compiled for a group of one, Triton 3.6 spills a register
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_stride, v_stride, kv_heads, group, S, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the `group` query heads that read key/value head program_id(0), over run program_id(1) of its keys.

    q is [B, Hkv, group, D], contiguous; k and v [B, Hkv, S, D] by their strides, program_id(0) = batch * Hkv + head.
    out [splits, B, Hkv, group, D] is each run's softmax-weighted mean of values, and lse [splits, B, Hkv, group] the
    natural log of the sum of its exponentials; scores q kᵀ scale2 are in base 2. A run is whole tiles of BLOCK
    positions, never none, and nothing from S on is read. Sums are float32; weights meet values in the dtype of those.
    """
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    k_ptr += head_start(head // kv_heads, head % kv_heads, k_stride, D)
    v_ptr += head_start(head // kv_heads, head % kv_heads, v_stride, D)
    member, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    query, live = head.to(tl.int64) * group + member, (member < group)[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + query[:, None] * D + column[None, :], mask=live, other=0.0)
    maximum = tl.full((BLOCK_H,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    tiles = tl.cdiv(S, BLOCK)
    for start in range(split * tiles // splits * BLOCK, (split + 1) * tiles // splits * BLOCK, BLOCK):
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        scores = tl.where((start + tl.arange(0, BLOCK) < S)[None, :], scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # each tile has a position: finite
        weights, rescale = tl.exp2(scores - new_maximum[:, None]), tl.exp2(maximum - new_maximum)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK, BLOCK_D)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    row = (split.to(tl.int64) * tl.num_programs(0)) * group + query
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + column[None, :], out, mask=live)
    tl.store(lse_ptr + row, (maximum + tl.log2(total)) * LN2, mask=member < group)


@triton.jit
def combine_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, rows, splits, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program: one row of out [rows, D] and lse [rows], from outs [splits, rows, D] and lses [splits, rows].

    A split with an lse of -inf has no keys and its out is not read; if none has any, out is 0 and lse -inf.
    """
    query = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    place = split.to(tl.int64) * rows + query
    lse = tl.load(lses_ptr + place, mask=split < splits, other=-INFINITY)
    maximum = tl.max(lse, 0)
    weights = tl.exp2((lse - tl.where(maximum == -INFINITY, 0.0, maximum)) * LOG2E)
    total = tl.sum(weights, 0)
    total = tl.where(total == 0, 1.0, total)  # no keys; NaN stays
    live = (lse > -INFINITY)[:, None] & (column < D)[None, :]
    outs = tl.load(outs_ptr + place[:, None] * D + column[None, :], mask=live, other=0.0).to(tl.float32)
    out = tl.sum(outs * (weights / total)[:, None], 0)
    tl.store(out_ptr + query * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)
    tl.store(lse_ptr + query, maximum + tl.log2(total) * LN2)


@triton.jit
def flat_matmul_kernel(
    x_ptr, weight_ptr, out_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program: BLOCK_N columns of out [M, N] = x [M, K] weight [N, K]ᵀ, for M up to BLOCK_M; sums in float32."""
    row, column = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_ptr += column.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        weight = tl.load(weight_ptr + k[None, :], mask=(column < N)[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=(row < M)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    out = tl.trans(acc).to(out_ptr.dtype.element_ty)
    live = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out_ptr + row[:, None].to(tl.int64) * N + column[None, :], out, mask=live)


def configuration(heads: int, length: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Positions of a tile, and splits: a power of two up to 64, until two programs run on each of 132 multiprocessors.

    heads: those of keys, of the whole batch. More than one split only where each has at least two tiles.
    """
    block, splits = 32 if dtype is torch.float32 else 64, 1
    while heads * splits < 264 and splits < MOST_SPLITS and triton.cdiv(length, block) >= 4 * splits:
        splits *= 2
    return {"block": block, "splits": splits}


def flash_decoding(
    q: Tensor, k: Tensor, v: Tensor, splits: int | None = None, scale: float | None = None, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ scale) v of one new token, and its log-sum-exp: out like q, lse `[B, H, 1]` float32.

    q `[B, H, 1, D]`, contiguous, D up to 256; k, v `[B, Hkv, S, D]` of the same dtype; scale 1/√D if None. splits, from
    1 to 64 (more than there are tiles count as so many), and block, positions of a tile, a power of two from 16 to 256,
    replace those of `configuration`. Raises ValueError for shapes, strides, devices or options that do not fit,
    TypeError for dtypes.
    """
    scale = checked_scale(q, k, v, scale, None, block)
    require(q.shape[2] == 1, f"q must be [B, H, 1, D], one new token, got {tuple(q.shape)}")
    require_contiguous(q=q)
    require(splits is None or 1 <= splits <= MOST_SPLITS, f"splits must be from 1 to {MOST_SPLITS}, got {splits}")
    (B, H, _, D), (Hkv, S) = q.shape, k.shape[1:3]
    chosen = configuration(B * Hkv, S, q.dtype)
    block = block or chosen["block"]
    splits = min(splits or chosen["splits"], -(-S // block))
    one = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    parts = (
        one
        if splits == 1
        else tuple(torch.empty((splits, *x.shape), dtype=torch.float32, device=q.device) for x in one)
    )
    decode_kernel[(B * Hkv, splits)](
        q, k, v, *parts, k.stride(), v.stride(), Hkv, H // Hkv, S, scale * LOG2E.value, D=D,
        BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_H=max(16, triton.next_power_of_2(H // Hkv)), BLOCK=block,
        num_warps=4, num_stages=3 if D <= 128 else 2,
    )  # fmt: skip
    return one if splits == 1 else _combine(*parts, *one)


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """(out `[..., D]`, lse `[...]`) of all keys, from outs `[splits, ..., D]` and lses `[splits, ...]` of runs of them.

    Both float32 and contiguous, at most 64 splits, D up to 256; lses are natural logarithms, -inf for a run without
    keys, whose out is not read. Other infinities and NaN make a row NaN. Raises ValueError and TypeError for others.
    """
    require(
        outs.dim() >= 2 and outs.numel() > 0, f"outs must be [splits, ..., D] and not empty, got {tuple(outs.shape)}"
    )
    require(outs.shape[:-1] == lses.shape, f"lses must be {tuple(outs.shape[:-1])}, got {tuple(lses.shape)}")
    splits, D = outs.shape[0], outs.shape[-1]
    require(splits <= MOST_SPLITS and D <= 256, f"splits must be at most {MOST_SPLITS}, D 256; got {splits} and {D}")
    require_dtype((torch.float32,), outs=outs, lses=lses)
    require_contiguous(outs=outs, lses=lses)
    require_launchable(outs=outs, lses=lses)
    return _combine(outs, lses, torch.empty_like(outs[0]), torch.empty_like(lses[0]))


def _combine(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `combine_kernel` into out and lse."""
    splits, D = outs.shape[0], outs.shape[-1]
    meta = {"D": D, "SPLITS": triton.next_power_of_2(splits), "BLOCK_D": triton.next_power_of_2(D)}
    combine_kernel[(lse.numel(),)](outs, lses, out, lse, lse.numel(), splits, num_warps=4, **meta)
    return out, lse


def flat_matmul(x: Tensor, weight: Tensor, block_n: int | None = None) -> Tensor:
    """x weightᵀ `[M, N]` in the dtype of both: x `[M, K]`, M from 1 to 16; weight `[N, K]`, contiguous like x.

    block_n, a power of two from 16 to 128, replaces the tile chosen by N. Raises ValueError or TypeError for others.
    """
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1] and x.numel() > 0 and weight.numel() > 0
    require(fits, f"x must be [M, K] and weight [N, K], not empty, got {tuple(x.shape)} and {tuple(weight.shape)}")
    (M, K), N = x.shape, weight.shape[0]
    require(M <= FLAT_ROWS, f"x must have at most {FLAT_ROWS} rows, got {M}")
    require(block_n in (None, 16, 32, 64, 128), f"block_n must be a power of two from 16 to 128, got {block_n}")
    require_dtype(DTYPES, x=x)
    require_dtype((x.dtype,), weight=weight)
    require_contiguous(x=x, weight=weight)
    require_launchable(x=x, weight=weight)
    block_n = block_n or (16 if N < 32 * 264 else 32)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    flat_matmul_kernel[(triton.cdiv(N, block_n),)](
        x, weight, out, M, N, K, BLOCK_M=FLAT_ROWS, BLOCK_N=block_n, BLOCK_K=32 if x.dtype is torch.float32 else 256,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`flash_decoding` without its lse, as the cases call it."""
    return flash_decoding(q, k, v)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch's own operator."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def decode_case(name: str, B: int, heads: int, kv_heads: int, length: int) -> Case:
    """One token of each of B texts in a layer of Llama, D = 128."""

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        make = torch.empty if device.type == "cpu" else torch.randn
        shapes = ((B, heads, 1, 128), (B, kv_heads, length, 128), (B, kv_heads, length, 128))
        return tuple(make(shape, dtype=torch.bfloat16, device=device) for shape in shapes)

    return Case(
        name,
        inputs=inputs,
        run=attend,
        expected=sdpa,
        bytes=4 * B * kv_heads * length * 128 + 4 * B * heads * 128 + 4 * B * heads,
        operations=4 * B * heads * length * 128,
        kind="stream",
        peers={"SDPA": sdpa},
    )


def flat_case(name: str, M: int, N: int, K: int) -> Case:
    """A linear layer of Llama with the rows of one decode step."""

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        make = torch.empty if device.type == "cpu" else torch.randn
        return tuple(make(shape, dtype=torch.bfloat16, device=device) for shape in ((M, K), (N, K)))

    moved = 2 * (N * K + M * K + M * N)
    return Case(name, inputs, flat_matmul, F.linear, moved, 2 * M * N * K, kind="stream", peers={"cuBLAS": F.linear})


CASES = [
    decode_case("8B, batch 1 x 8192", 1, 32, 8, 8192),
    decode_case("8B, batch 1 x 131072", 1, 32, 8, 131072),
    decode_case("8B, batch 16 x 8192", 16, 32, 8, 8192),
    decode_case("7B, batch 16 x 4096", 16, 32, 32, 4096),
    flat_case("flat, 1 x 4096 to 4096", 1, 4096, 4096),
    flat_case("flat, 8 x 4096 to 14336", 8, 14336, 4096),
    flat_case("flat, 16 x 14336 to 4096", 16, 4096, 14336),
]
