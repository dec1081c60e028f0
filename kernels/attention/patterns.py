"""Block-sparse FlashAttention in Triton: only live blocks of queries and keys are read, and only partial ones masked.

Fused: Q Kᵀ, mask, softmax and the product with V, forward and backward, as in kernels/attention/flash.py. What is new
is the way along the keys: a program holds a tile of queries and follows the list of its row of blocks, first the
partial blocks, with a bit for each pair, then the full ones, which are as whole tiles as dense attention has. dK and dV
follow the lists of the transposed mask. Rows with most live blocks start first: a global row of BigBird takes as long
as all of a dense one, and should not be met last.

With e bytes a number, A = block_q · block_k, `live` of the R · C blocks live and `partial` of those partial:
    operations  forward 4 B H D A live; backward 10 B H D A live, and 4 more because S and dP are computed twice
    floor       forward e B D (2 H T + 2 Hkv S) + 4 B H T bytes: q, k, v in, out and lse out, each once;
                lists 16 R + 4 R C, bits A / 8 partial, once for each mask
    read        2 e D block_k bytes of keys and values per live block, tile of queries and head, mostly from L2
Replaces softmax(where(mask, q @ k.mT * scale, -inf)) @ v, which computes all R · C blocks, moves 4 e B H T S bytes of
scores and weights, and reads a mask of T S bytes. Time follows `live`, not the number of pairs that are seen.

Layout: q [B, H, T, D]; k, v [B, Hkv, S, D], float16, bfloat16 or float32, D up to 256, strides as in flash.py; lists as
kernels/shared/block_lists.py says. Query head h reads key head h // (H / Hkv), and mask h, or the only one. Pairs past
T or S have no bit set, and full blocks have none of them, so that bits stand in for every other mask. A row without
keys: out 0, lse -inf, gradients 0. Scores are kept in base 2: `scale2` = scale log2(e).
Method: Dao et al. 2022, arXiv:2205.14135, section 3.3 and algorithm 5; lists of flex_attention (Dong et al. 2024,
arXiv:2412.05496).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention.flash import delta_kernel, load_statistics
from kernels.guard import require, require_dtype, require_launchable
from kernels.shared.attentions import checked_scale
from kernels.shared.block_cases import backward_case, band_case
from kernels.shared.block_lists import DeviceMask, launch_options, load_seen, read_table
from kernels.shared.tiles import head_start, load_tile, loadable, store_tile

LOG2E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)


@triton.jit
def attend_blocks(
    maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, index_ptr, bits_ptr, first, last, S, scale2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax of a query tile `q` over the blocks first .. last of its list: new (maximum, total, acc).

    All float32 and over the keys seen so far: `maximum` [BLOCK_Q] of the base-2 scores q kᵀ scale2, -inf before any;
    `total` [BLOCK_Q] of the weights exp2(score - maximum); `acc` [BLOCK_Q, BLOCK_D], the values summed with them, which
    only there take the dtype of v. Block n is the SIZE_K keys from SIZE_K · index_ptr[n] on, in tiles of BLOCK_K. If
    MASKED, its pairs are bits [SIZE_Q, SIZE_K] from byte n · SIZE_Q · SIZE_K / 8 of bits_ptr on, which points at the
    tile's first row in block 0; they may show a row nothing, and hide all keys from S on, which are not loaded. If not,
    all its pairs are seen and all its keys are there. k and v have strides of their own.
    """
    parts: tl.constexpr = SIZE_K // BLOCK_K
    for step in range(first * parts, last * parts):
        block, part = step // parts, step % parts
        start = tl.load(index_ptr + block) * SIZE_K + part * BLOCK_K
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K], not yet scaled
        if MASKED:
            bits = bits_ptr + tl.full((), block, tl.int64) * (SIZE_Q * SIZE_K // 8)
            seen = load_seen(bits, part, SIZE_K, q.shape[0], BLOCK_K)
            scores = tl.where(seen, scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale2)
        finite = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)  # -inf - -inf would be NaN
        weights = tl.exp2(scores * scale2 - finite[:, None])
        rescale = tl.exp2(maximum - finite)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, index_ptr, bits_ptr, q_stride, k_stride, v_stride, out_stride,
    heads, group, masks, rows, columns, T, S, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head, BLOCK_Q of the SIZE_Q in its row of blocks."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    mask_row = head % masks * rows
    row, several, live, slot, part = read_table(table_ptr, mask_row, BLOCK_Q, SIZE_Q)
    index_ptr += (mask_row + row).to(tl.int64) * columns
    bits_ptr += (slot * SIZE_Q + part * BLOCK_Q) * (SIZE_K // 8)
    start = row * SIZE_Q + part * BLOCK_Q
    k_ptr += head_start(batch, head // group, k_stride, D)
    v_ptr += head_start(batch, head // group, v_stride, D)
    q = load_tile(q_ptr + head_start(batch, head, q_stride, D), start, q_stride, T, D, BLOCK_Q, BLOCK_D)
    maximum = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    if live > several:  # around a loop that may not run the sums are written on a second path, and each wgmma waits
        maximum, total, acc = attend_blocks(
            maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, index_ptr, bits_ptr, several, live, S, scale2,
            D, BLOCK_K, SIZE_Q, SIZE_K, False,
        )  # fmt: skip
    if several > 0:
        maximum, total, acc = attend_blocks(
            maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, index_ptr, bits_ptr, 0, several, S, scale2,
            D, BLOCK_K, SIZE_Q, SIZE_K, True,
        )  # fmt: skip
    total = tl.where(total == 0, 1.0, total)  # a row that sees no key: out 0, lse still -inf; a NaN stays one
    acc = acc / total[:, None]
    store_tile(out_ptr + head_start(batch, head, out_stride, D), acc, start, out_stride, T, D, BLOCK_Q, BLOCK_D)
    query = start + tl.arange(0, BLOCK_Q)
    lse_ptr += tl.program_id(0).to(tl.int64) * T
    tl.store(lse_ptr + query, (maximum + tl.log2(total)) / LOG2E, mask=query < T)


@triton.jit
def add_key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, dout_stride, index_ptr, bits_ptr, first, last, T,
    scale2, D: tl.constexpr, BLOCK_Q: tl.constexpr, SIZE_K: tl.constexpr, SIZE_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv [BLOCK_K, BLOCK_D] of a key tile, increased by what the query blocks first .. last of its list
    give.

    Scores are held transposed, [BLOCK_K, BLOCK_Q], and so are the bits of a partial block, [SIZE_K, SIZE_Q].
    """
    parts: tl.constexpr = SIZE_Q // BLOCK_Q
    for step in range(first * parts, last * parts):
        block, part = step // parts, step % parts
        start = tl.load(index_ptr + block) * SIZE_Q + part * BLOCK_Q
        q = load_tile(q_ptr, start, q_stride, T, D, BLOCK_Q, dk.shape[1], not MASKED)
        lse, delta = load_statistics(lse_ptr, delta_ptr, start + tl.arange(0, BLOCK_Q), T)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        if MASKED:
            bits = bits_ptr + tl.full((), block, tl.int64) * (SIZE_K * SIZE_Q // 8)
            seen = load_seen(bits, part, SIZE_Q, k.shape[0], BLOCK_Q)
            scores = tl.where(seen, scores, -INFINITY)
        weights = tl.exp2(scores * scale2 - lse[None, :])
        dout = load_tile(dout_ptr, start, dout_stride, T, D, BLOCK_Q, dk.shape[1], not MASKED)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
        dscores = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr, index_ptr, bits_ptr,
    q_stride, k_stride, v_stride, dout_stride, dk_stride, dv_stride, kv_heads, group, masks, rows, columns, T, S,
    scale, scale2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of one tile of keys, summed over the `group` query heads that read them.

    `rows` of the table are blocks of keys here, `columns` of the lists blocks of queries.
    """
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    row, several, live, slot, part = read_table(table_ptr, 0, BLOCK_K, SIZE_K)
    start = row * SIZE_K + part * BLOCK_K
    k = load_tile(k_ptr + head_start(batch, kv_head, k_stride, D), start, k_stride, S, D, BLOCK_K, BLOCK_D)
    v = load_tile(v_ptr + head_start(batch, kv_head, v_stride, D), start, v_stride, S, D, BLOCK_K, BLOCK_D)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        mask_row = head % masks * rows
        row, several, live, slot, part = read_table(table_ptr, mask_row, BLOCK_K, SIZE_K)  # the row is the same
        indices = index_ptr + (mask_row + row).to(tl.int64) * columns
        bits = bits_ptr + (slot * SIZE_K + part * BLOCK_K) * (SIZE_Q // 8)
        queries = q_ptr + head_start(batch, head, q_stride, D)
        douts = dout_ptr + head_start(batch, head, dout_stride, D)
        statistics = (batch * kv_heads * group + head).to(tl.int64) * T
        dk, dv = add_key_gradients(
            dk, dv, k, v, queries, douts, lse_ptr + statistics, delta_ptr + statistics, q_stride, dout_stride, indices,
            bits, several, live, T, scale2, D, BLOCK_Q, SIZE_K, SIZE_Q, False,
        )  # fmt: skip
        dk, dv = add_key_gradients(
            dk, dv, k, v, queries, douts, lse_ptr + statistics, delta_ptr + statistics, q_stride, dout_stride, indices,
            bits, 0, several, T, scale2, D, BLOCK_Q, SIZE_K, SIZE_Q, True,
        )  # fmt: skip
    store_tile(dk_ptr + head_start(batch, kv_head, dk_stride, D), dk * scale, start, dk_stride, S, D, BLOCK_K, BLOCK_D)
    store_tile(dv_ptr + head_start(batch, kv_head, dv_stride, D), dv, start, dv_stride, S, D, BLOCK_K, BLOCK_D)


@triton.jit
def add_query_gradients(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, index_ptr, bits_ptr, first, last, S, scale2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale [BLOCK_Q, BLOCK_D], increased by what blocks first .. last of its list give; see `attend_blocks`."""
    parts: tl.constexpr = SIZE_K // BLOCK_K
    for step in range(first * parts, last * parts):
        block, part = step // parts, step % parts
        start = tl.load(index_ptr + block) * SIZE_K + part * BLOCK_K
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, dq.shape[1], not MASKED)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, dq.shape[1], not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            bits = bits_ptr + tl.full((), block, tl.int64) * (SIZE_Q * SIZE_K // 8)
            seen = load_seen(bits, part, SIZE_K, q.shape[0], BLOCK_K)
            scores = tl.where(seen, scores, -INFINITY)
        weights = tl.exp2(scores * scale2 - lse[:, None])
        dscores = weights * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr, index_ptr, bits_ptr, q_stride, k_stride,
    v_stride, dout_stride, dq_stride, heads, group, masks, rows, columns, T, S, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr,
):  # fmt: skip
    """One program: dQ of one tile of queries; same way as `forward_kernel`."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    mask_row = head % masks * rows
    row, several, live, slot, part = read_table(table_ptr, mask_row, BLOCK_Q, SIZE_Q)
    index_ptr += (mask_row + row).to(tl.int64) * columns
    bits_ptr += (slot * SIZE_Q + part * BLOCK_Q) * (SIZE_K // 8)
    start = row * SIZE_Q + part * BLOCK_Q
    k_ptr += head_start(batch, head // group, k_stride, D)
    v_ptr += head_start(batch, head // group, v_stride, D)
    q = load_tile(q_ptr + head_start(batch, head, q_stride, D), start, q_stride, T, D, BLOCK_Q, BLOCK_D)
    dout = load_tile(dout_ptr + head_start(batch, head, dout_stride, D), start, dout_stride, T, D, BLOCK_Q, BLOCK_D)
    statistics = tl.program_id(0).to(tl.int64) * T
    query = start + tl.arange(0, BLOCK_Q)
    lse, delta = load_statistics(lse_ptr + statistics, delta_ptr + statistics, query, T)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    if live > several:
        dq = add_query_gradients(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, index_ptr, bits_ptr, several, live, S, scale2,
            D, BLOCK_K, SIZE_Q, SIZE_K, False,
        )  # fmt: skip
    if several > 0:
        dq = add_query_gradients(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, index_ptr, bits_ptr, 0, several, S, scale2,
            D, BLOCK_K, SIZE_Q, SIZE_K, True,
        )  # fmt: skip
    store_tile(dq_ptr + head_start(batch, head, dq_stride, D), dq * scale, start, dq_stride, T, D, BLOCK_Q, BLOCK_D)


def _lists(mask: DeviceMask, transposed: bool = False) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    """The tensors of one way's lists, (masks, rows, columns), and how many queries or keys a row of blocks has."""
    lists = mask.columns if transposed else mask.rows
    return tuple(lists), tuple(lists.indices.shape), mask.size[transposed]


class BlockSparseAttention(torch.autograd.Function):
    """The differentiable pair: keeps q, k, v, out and lse for the backward pass, and nothing of size T x S."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        options, (B, H, T, _), (Hkv, S) = launch_options("forward", q, mask), q.shape, k.shape[1:3]
        lists, sizes, block = _lists(mask)
        forward_kernel[(B * H, sizes[1] * (block // options["BLOCK_Q"]))](
            q, k, v, out, lse, *lists, q.stride(), k.stride(), v.stride(), out.stride(), H, H // Hkv, *sizes, T, S,
            scale * LOG2E.value, **options,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale = mask, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        dout = dout if loadable(dout) else dout.contiguous()
        return *block_sparse_attention_backward(dout, *ctx.saved_tensors, ctx.mask, ctx.scale), None, None


def _checked(q: Tensor, k: Tensor, v: Tensor, mask: DeviceMask, scale: float | None, **more: Tensor) -> float:
    """The scale to use. Raises what `block_sparse_attention` promises."""
    scale = checked_scale(q, k, v, scale, None, None, **more)
    masks, lengths = len(mask.rows.table), (q.shape[2], k.shape[2])
    require(
        mask.shape == lengths and masks in (1, q.shape[1]),
        f"mask must be for {lengths} queries and keys and one head or {q.shape[1]}, got {mask.shape} and {masks}",
    )
    require_launchable(q=q, mask=mask.rows.table)
    return scale


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: DeviceMask, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs that `mask` sees: out like q, lse `[B, H, T]` float32. Differentiable through out.

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]` of the same dtype; mask as `on_device` makes it, for one head or H;
    scale 1/√D if None. A query that sees no key gets out 0 and lse -inf. Raises ValueError for shapes, strides, devices
    or a mask that do not fit, TypeError for dtypes.
    """
    return BlockSparseAttention.apply(q, k, v, mask, _checked(q, k, v, mask, scale))


def block_sparse_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: DeviceMask,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for the gradient `dout` of out, from what the forward pass took and gave. Raises as it does."""
    scale = _checked(q, k, v, mask, scale, dout=dout, out=out)
    require_dtype((torch.float32,), lse=lse)
    fits = dout.shape == out.shape == q.shape and lse.shape == q.shape[:3] and lse.is_contiguous()
    require(fits, f"dout, out and lse must fit q, got {tuple(dout.shape)}, {tuple(out.shape)}, {tuple(lse.shape)}")
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    (B, H, T, _), (Hkv, S), scale2 = q.shape, k.shape[1:3], scale * LOG2E.value
    options, (lists, sizes, block) = launch_options("query gradient", q, mask), _lists(mask)
    delta_kernel[(B * H, triton.cdiv(T, 32))](
        dout, out, delta, dout.stride(), out.stride(), H, T, options["D"], options["BLOCK_D"], BLOCK_Q=32
    )
    query_gradient_kernel[(B * H, sizes[1] * (block // options["BLOCK_Q"]))](
        q, k, v, dout, lse, delta, dq, *lists, q.stride(), k.stride(), v.stride(), dout.stride(), dq.stride(), H,
        H // Hkv, *sizes, T, S, scale, scale2, **options,
    )  # fmt: skip
    options, (lists, sizes, block) = launch_options("key gradient", q, mask), _lists(mask, transposed=True)
    key_gradient_kernel[(B * Hkv, sizes[1] * (block // options["BLOCK_K"]))](
        q, k, v, dout, lse, delta, dk, dv, *lists, q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride(),
        dv.stride(), Hkv, H // Hkv, *sizes, T, S, scale, scale2, **options,
    )  # fmt: skip
    return dq, dk, dv


attend, attend_backward = block_sparse_attention, block_sparse_attention_backward
CASES = [  # Mistral-7B and Llama-2-7B shapes; the first has no dead block below the diagonal, beside dense attention
    band_case("causal, 4096 tokens, 32 heads of 128", attend, 32, 32, 4096, 128, 4096),
    band_case("window 4096 of 16384, 32 heads of 128, 8 for keys", attend, 32, 8, 16384, 128, 4096),
    band_case("window 1024, 128 sinks of 16384", attend, 32, 8, 16384, 128, 1024, 128),
    band_case("window 1024 of 8192, 32 heads of 64", attend, 32, 32, 8192, 64, 1024),
    backward_case("backward, window 1024 of 8192, 8 for keys", attend_backward, 32, 8, 8192, 128, 1024),
    backward_case("backward, window 1024 of 8192, heads of 64", attend_backward, 32, 32, 8192, 64, 1024),
]
