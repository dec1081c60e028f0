"""FlashAttention with windows, soft caps, ALiBi and packed sequences in Triton, both passes: one family of kernels.

Fused into the loops of `kernels.attention.flash`: cap, bias and window, on scores that never reach memory; and a
program finds the sequence that its tile belongs to by itself. Options that are None are compiled away, so that plain
causal attention is the same code as there. Each loop over keys is cut in three, so that only tiles that cross an edge
of the window pay for a mask, and tiles outside of it are not visited.

With e bytes a number and `pairs` the pairs of a query and a key that it sees, about T (left + right) with a window:
    operations  forward 4 H D pairs; backward 10 H D pairs, and 4 more because S and dP are computed twice
    floor       forward e D (2 H T + 2 Hkv S) + 4 H T bytes: q, k, v in, out and lse out, each once; 8 N of offsets
    read        K and V pass by once per query tile and head, those that it sees: left + right + BLOCK_Q keys for each
                tile with a window, whatever T is, mostly from L2
Replaces scores with a mask and a bias in memory, T x S of them four times: 4 e H T S bytes more; and padding: N times
the longest sequence instead of the sum of all, of each of these.

Programs    a grid of T // BLOCK + N tiles for each head when packed: at most one tile a sequence that there is nothing
            to do for. A grid over the longest sequence would start N times its tiles, and needs to know it; a list of
            tiles is 8 bytes for each, written by another launch. Here the offsets are enough, 4 bytes a sequence.
Layout      q [B, H, T, D]; k, v [B, Hkv, S, D], packed as a batch of one; float16, bfloat16 or float32, D up to 256.
            Any strides with a contiguous last axis (multiples of 8 if D is one), so that heads cut from a projection
            [tokens, heads, D] need no copy. Offsets int32 [N + 1]; slopes float32 [H].
Method      Dao 2023, arXiv:2307.08691, and the options of its code; tiles found by bisection as in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention.flash import delta_kernel, load_statistics
from kernels.shared.attention_options import Options, Setting, Window, checked, require_statistics, variant_case
from kernels.shared.flash_scores import (
    find_tile,
    key_span,
    masked_run,
    modified_scores,
    query_span,
    sequence_start,
    tile_start,
    within,
)
from kernels.shared.flash_tiles import variant_options
from kernels.shared.tiles import load_tile, loadable, store_tile

LOG2E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)


@triton.jit
def attend_tiles(
    maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, span, T, S, left, right, scale2, cap2, slope2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax of a query tile `q`, its rows `row`, over some of the keys of `span`: new (maximum, total, acc).

    All float32 and over the keys seen so far: `maximum` [BLOCK_Q] of the base-2 scores, -inf before any; `total`
    [BLOCK_Q] of the weights exp2(score - maximum); `acc` [BLOCK_Q, BLOCK_D], the values summed with them. Scores are
    those of `modified_scores`. span (first, whole, stop, last) is that of `key_span`: MASKED, its keys first .. whole
    and stop .. last, tiles that cross an edge of the window or the end of the keys, and may show a row nothing; if not,
    whole .. stop, where all is visible. No row from S on is loaded; weights take the dtype of v to meet it.
    """
    begin, end = masked_run(span, left, MASKED)
    for place in range(begin, end, BLOCK_K):
        start = tile_start(place, span, left, MASKED)
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        column = start + tl.arange(0, BLOCK_K)
        distance = column[None, :] - (row + S - T)[:, None]
        scores, _ = modified_scores(products, distance, scale2, cap2, slope2)
        if MASKED:
            scores = tl.where(within(distance, (column < S)[None, :], left, right), scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        finite = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - finite[:, None])
        rescale = tl.exp2(maximum - finite)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stride, k_stride, v_stride, out_stride, slopes_ptr, cu_q_ptr, cu_k_ptr,
    sequences, heads, group, tokens, keys, left, right, scale2, cap2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head. The last tiles see the most keys, so they start first."""
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    start, first_q, T, first_k, S = find_tile(tile, cu_q_ptr, cu_k_ptr, sequences, tokens, keys, BLOCK_Q)
    if start >= T:
        return
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    slope2 = slopes_ptr
    if slopes_ptr is not None:
        slope2 = tl.load(slopes_ptr + head) * LOG2E
    k_ptr += sequence_start(batch, head // group, first_k, k_stride, D)
    v_ptr += sequence_start(batch, head // group, first_k, v_stride, D)
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + sequence_start(batch, head, first_q, q_stride, D), start, q_stride, T, D, BLOCK_Q, BLOCK_D)
    maximum = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    span = key_span(start, T, S, left, right, BLOCK_Q, BLOCK_K)
    if span[2] > span[1]:  # around a loop that may not run each wgmma waits
        maximum, total, acc = attend_tiles(
            maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, span, T, S, left, right, scale2, cap2,
            slope2, D, BLOCK_K, False,
        )  # fmt: skip
    if span[3] - span[2] + span[1] > span[0]:
        maximum, total, acc = attend_tiles(
            maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, span, T, S, left, right, scale2, cap2,
            slope2, D, BLOCK_K, True,
        )  # fmt: skip
    total = tl.where(total == 0, 1.0, total)  # a row that sees no key: out 0, lse still -inf; a NaN stays one
    out_ptr += sequence_start(batch, head, first_q, out_stride, D)
    store_tile(out_ptr, acc / total[:, None], start, out_stride, T, D, BLOCK_Q, BLOCK_D)
    lse_ptr += tl.program_id(0).to(tl.int64) * tokens + first_q
    near = tl.arange(0, BLOCK_Q)  # not `row`, which registers would hold until here
    tl.store(lse_ptr + start + near, (maximum + tl.log2(total)) / LOG2E, mask=near < T - start)


@triton.jit
def add_key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, dout_stride, start, column, T, S, left, right, scale2,
    cap2, slope2, D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv [BLOCK_K, BLOCK_D] of the keys `column`, increased by what the query tile at `start` gives.

    Scores are held transposed, [BLOCK_K, BLOCK_Q], as both products that accumulate want them; they are those of
    `modified_scores`, masked as `within` says, whose `gain` is the cap's part in the gradient. All is float32, but what
    meets dout or q takes its dtype. q and dout have strides of their own; no row from T on is loaded.
    """
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr, start, q_stride, T, D, BLOCK_Q, dk.shape[1])
    lse, delta = load_statistics(lse_ptr, delta_ptr, row, T)
    products = tl.dot(k, tl.trans(q), input_precision="ieee")
    distance = column[:, None] - (row + S - T)[None, :]
    scores, gain = modified_scores(products, distance, scale2, cap2, slope2)
    scores = tl.where(within(distance, (column < S)[:, None], left, right), scores, -INFINITY)
    weights = tl.exp2(scores - lse[None, :])
    dout = load_tile(dout_ptr, start, dout_stride, T, D, BLOCK_Q, dk.shape[1])
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dproducts = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :]) * gain
    dk = tl.dot(dproducts.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_stride, k_stride, v_stride, dout_stride,
    dk_stride, dv_stride, slopes_ptr, cu_q_ptr, cu_k_ptr, sequences, kv_heads, group, tokens, keys, left, right, scale,
    scale2, cap2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of one tile of keys, summed over the `group` query heads that read them."""
    tile = tl.program_id(1)
    start, first_k, S, first_q, T = find_tile(tile, cu_k_ptr, cu_q_ptr, sequences, keys, tokens, BLOCK_K)
    if start >= S:
        return
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    column = start + tl.arange(0, BLOCK_K)
    k_ptr += sequence_start(batch, kv_head, first_k, k_stride, D)
    v_ptr += sequence_start(batch, kv_head, first_k, v_stride, D)
    k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, BLOCK_D)
    v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, BLOCK_D)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first, last = query_span(start, T, S, left, right, BLOCK_Q, BLOCK_K)
    head, number = kv_head * group, first
    for _ in range(0, group * tl.maximum(last - first, 0)):  # nested loops would take more registers
        slope2 = slopes_ptr
        if slopes_ptr is not None:
            slope2 = tl.load(slopes_ptr + head) * LOG2E
        statistics = (batch * kv_heads * group + head).to(tl.int64) * tokens + first_q
        dk, dv = add_key_gradients(
            dk, dv, k, v, q_ptr + sequence_start(batch, head, first_q, q_stride, D),
            dout_ptr + sequence_start(batch, head, first_q, dout_stride, D), lse_ptr + statistics,
            delta_ptr + statistics, q_stride, dout_stride, number * BLOCK_Q, column, T, S, left, right, scale2, cap2,
            slope2, D, BLOCK_Q,
        )  # fmt: skip
        head = tl.where(number + 1 == last, head + 1, head)
        number = tl.where(number + 1 == last, first, number + 1)
    dk_ptr += sequence_start(batch, kv_head, first_k, dk_stride, D)
    dv_ptr += sequence_start(batch, kv_head, first_k, dv_stride, D)
    store_tile(dk_ptr, dk * scale, start, dk_stride, S, D, BLOCK_K, BLOCK_D)
    store_tile(dv_ptr, dv, start, dv_stride, S, D, BLOCK_K, BLOCK_D)


@triton.jit
def query_gradient_tiles(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, row, span, T, S, left, right, scale2, cap2, slope2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale [BLOCK_Q, BLOCK_D], increased by what keys of `span` give; span and MASKED as in `attend_tiles`."""
    begin, end = masked_run(span, left, MASKED)
    for place in range(begin, end, BLOCK_K):
        start = tile_start(place, span, left, MASKED)
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, dq.shape[1], not MASKED)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, dq.shape[1], not MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        column = start + tl.arange(0, BLOCK_K)
        distance = column[None, :] - (row + S - T)[:, None]
        scores, gain = modified_scores(products, distance, scale2, cap2, slope2)
        if MASKED:
            scores = tl.where(within(distance, (column < S)[None, :], left, right), scores, -INFINITY)
        weights = tl.exp2(scores - lse[:, None])
        dproducts = weights * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None]) * gain
        dq = tl.dot(dproducts.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, q_stride, k_stride, v_stride, dout_stride, dq_stride,
    slopes_ptr, cu_q_ptr, cu_k_ptr, sequences, heads, group, tokens, keys, left, right, scale, scale2, cap2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: dQ of one tile of queries; same loops as `forward_kernel`."""
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    start, first_q, T, first_k, S = find_tile(tile, cu_q_ptr, cu_k_ptr, sequences, tokens, keys, BLOCK_Q)
    if start >= T:
        return
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    slope2 = slopes_ptr
    if slopes_ptr is not None:
        slope2 = tl.load(slopes_ptr + head) * LOG2E
    k_ptr += sequence_start(batch, head // group, first_k, k_stride, D)
    v_ptr += sequence_start(batch, head // group, first_k, v_stride, D)
    dout_ptr += sequence_start(batch, head, first_q, dout_stride, D)
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + sequence_start(batch, head, first_q, q_stride, D), start, q_stride, T, D, BLOCK_Q, BLOCK_D)
    dout = load_tile(dout_ptr, start, dout_stride, T, D, BLOCK_Q, BLOCK_D)
    statistics = tl.program_id(0).to(tl.int64) * tokens + first_q
    lse, delta = load_statistics(lse_ptr + statistics, delta_ptr + statistics, row, T)
    span = key_span(start, T, S, left, right, BLOCK_Q, BLOCK_K)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    if span[2] > span[1]:
        dq = query_gradient_tiles(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, row, span, T, S, left, right, scale2, cap2,
            slope2, D, BLOCK_K, False,
        )  # fmt: skip
    if span[3] - span[2] + span[1] > span[0]:
        dq = query_gradient_tiles(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, row, span, T, S, left, right, scale2, cap2,
            slope2, D, BLOCK_K, True,
        )  # fmt: skip
    dq_ptr += sequence_start(batch, head, first_q, dq_stride, D)
    store_tile(dq_ptr, dq * scale, start, dq_stride, T, D, BLOCK_Q, BLOCK_D)


class FlashAttention(torch.autograd.Function):
    """The differentiable pair: keeps q, k, v, out and lse for the backward pass, and nothing of size T x S."""

    @staticmethod
    def forward(ctx, q, k, v, options: Options, block_q, block_k):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        tile = variant_options("forward", q, block_q, block_k)
        (B, H, T, _), (Hkv, S), (scale2, cap2) = q.shape, k.shape[1:3], options.scales()
        forward_kernel[(B * H, options.tiles(T, tile["BLOCK_Q"]))](
            q, k, v, out, lse, q.stride(), k.stride(), v.stride(), out.stride(), options.slopes, options.cu_q,
            options.cu_k, options.sequences(), H, H // Hkv, T, S, options.left, options.right, scale2, cap2, **tile,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = (options, block_q, block_k)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        dout = dout if loadable(dout) else dout.contiguous()
        return *gradients(dout, *ctx.saved_tensors, *ctx.options), None, None, None


def gradients(dout, q, k, v, out, lse, options: Options, block_q, block_k) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by three launches, of checked arguments."""
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    (B, H, T, _), (Hkv, S), (scale2, cap2) = q.shape, k.shape[1:3], options.scales()
    tile = variant_options("query gradient", q, block_q, block_k)
    packed = (options.slopes, options.cu_q, options.cu_k, options.sequences())
    rest = (H // Hkv, T, S, options.left, options.right, options.scale, scale2, cap2)
    delta_kernel[(B * H, triton.cdiv(T, 32))](
        dout, out, delta, dout.stride(), out.stride(), H, T, tile["D"], tile["BLOCK_D"], BLOCK_Q=32
    )
    query_gradient_kernel[(B * H, options.tiles(T, tile["BLOCK_Q"]))](
        q, k, v, dout, lse, delta, dq, q.stride(), k.stride(), v.stride(), dout.stride(), dq.stride(), *packed, H,
        *rest, **tile,
    )  # fmt: skip
    tile = variant_options("key gradient", q, block_q, block_k)
    key_gradient_kernel[(B * Hkv, options.tiles(S, tile["BLOCK_K"]))](
        q, k, v, dout, lse, delta, dk, dv, q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride(), dv.stride(),
        *packed, Hkv, *rest, **tile,
    )  # fmt: skip
    return dq, dk, dv


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None, window: Window = (None, None),
    softcap: float | None = None, slopes: Tensor | None = None, cu_q: Tensor | Sequence[int] | None = None,
    cu_k: Tensor | Sequence[int] | None = None, block_q: int | None = None, block_k: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with any of these: out like q, lse `[B, H, T]` float32. Differentiable through out.

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]` of the same dtype; scale 1/√D if None. window (left, right), keys besides
    the own place, None for all; causal sets right to 0. softcap positive; slopes `[H]`; cu_q, cu_k integers `[N + 1]`
    with B = 1, cu_k as cu_q if None; on the CPU best, where checking them waits for no GPU. A query that sees no key
    gets out 0 and lse -inf. block_q and block_k, powers of two from 16 to 256, replace the tile chosen for the head
    size. Raises ValueError for shapes, strides, devices or options that do not fit, TypeError for dtypes.
    """
    options = checked(q, k, v, causal, scale, window, softcap, slopes, cu_q, cu_k, block_q, block_k)
    return FlashAttention.apply(q, k, v, options, block_q, block_k)


def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool = True,
    scale: float | None = None, window: Window = (None, None), softcap: float | None = None,
    slopes: Tensor | None = None, cu_q: Tensor | Sequence[int] | None = None,
    cu_k: Tensor | Sequence[int] | None = None, block_q: int | None = None, block_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) for the gradient `dout` of out, from what `flash_attention` took and gave. Raises as it does."""
    options = checked(q, k, v, causal, scale, window, softcap, slopes, cu_q, cu_k, block_q, block_k, dout=dout, out=out)
    require_statistics(q, dout, out, lse)
    return gradients(dout, q, k, v, out, lse, options, block_q, block_k)


LENGTHS = (2048, 1500, 1200, 900, 700, 500, 400, 300, 200, 150, 100, 80, 50, 30, 20, 14)  # a sum of 8192
MISTRAL = Setting(32, 8, 128, (16384,), window=4096)
GEMMA = Setting(16, 8, 256, (8192,), window=4096, softcap=50)
ALL = Setting(32, 8, 128, LENGTHS, window=512, softcap=30, alibi=True)
CASES = [
    variant_case("Mistral 7B, 16384 tokens, window 4096", flash_attention, MISTRAL),
    variant_case("Gemma 2 9B, 8192 tokens, window 4096, cap 50", flash_attention, GEMMA),
    variant_case("MPT 7B, 8192 tokens, ALiBi", flash_attention, Setting(32, 32, 128, (8192,), alibi=True)),
    variant_case("Llama 3 8B, 16 sequences, 8192 tokens", flash_attention, Setting(32, 8, 128, LENGTHS)),
    variant_case("32 heads of 64, 4096 tokens, window 512", flash_attention, Setting(32, 32, 64, (4096,), 512)),
    variant_case("training, Mistral 7B", flash_attention, MISTRAL, gradient=True),
    variant_case("training, Gemma 2 9B", flash_attention, GEMMA, gradient=True),
    variant_case("training, 16 sequences, all options", flash_attention, ALL, gradient=True),
]
