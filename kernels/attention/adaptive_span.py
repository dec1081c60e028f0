"""Adaptive-span attention in Triton: each head's soft mask, and no tile loaded that all its queries mask out.

FlashAttention with two changes. A tile of queries begins at the oldest key within span + ramp of its first query; what
is skipped follows from the head's span alone, which is read from memory: the host need not know it. And what lies on
the ramp counts less: m exp(s) is exp2(s log2(e) + log2 m), a bias that the running maximum takes in, so that weights in
16 bits are as exact there as elsewhere. Tiles between the ramp and the diagonal, where m is 1, run the plain loop.

With e bytes a number, reach = min(max_span, ramp + ceil(span)) and `pairs` = sum over heads of sum_i min(i + 1, reach),
T = S and causal:
    operations  forward 4 B D pairs; backward 10 B D pairs, and 4 more because S and dP are computed twice
    floor       forward e B D (2 H T + 2 Hkv S) + 4 B H T bytes: q, k, v in, out and lse out, each once
    read        a query tile and head pass by BLOCK_Q + reach keys and values, rounded to tiles, mostly from L2
Replaces softmax with a T x S mask for each head: 4 B H D T S operations and e H T S bytes of mask; or FlashAttention
over all keys, about T / (2 reach) times the work where the text is long.

The gradient of a span is summed over the ramp by the programs that compute dQ, one number for each tile of queries;
torch adds them up in a fixed order. Programs that hold keys (dK, dV) stop at the last query tile that reaches them.

Layout as in kernels/attention/flash.py; S >= T, span [H] float32. Scores are in base 2: `scale2` = scale log2(e).
Method: Sukhbaatar et al. 2019, arXiv:1905.07799, on Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention.flash import delta_kernel, load_statistics
from kernels.shared.spans import checked_spans, require_from_forward, span_backward_case, span_case, span_options
from kernels.shared.tiles import head_start, load_tile, loadable, store_tile

LOG2E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)


@triton.jit
def keys_in_reach(start, span, ramp, max_span, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(first, whole, diagonal, last) for the BLOCK_Q queries from row `start` on: which keys their tiles hold.

    Keys first .. last are read, in tiles of BLOCK_K that begin at multiples of it: `first` is the start of the tile of
    the oldest key with m > 0 for the first query, `last` one past the newest key of the last one, at most S. Of these,
    exactly the tiles of whole .. diagonal, multiples of BLOCK_K and equal if there is none, have m = 1 for all queries.
    A key at a distance x has m = (ramp + span - x) / ramp, cut to 0 .. 1, but 0 outside 0 <= x < max_span; row i stands
    at key i + S - T, and x counts back from there. Rows from T on may be taken for queries like the others.
    """
    newest = start + S - T
    reach = tl.maximum(tl.minimum(tl.ceil(span + ramp).to(tl.int32), max_span), 1)
    full = tl.minimum(tl.floor(span).to(tl.int32) + 1, max_span)
    first = tl.maximum(newest - reach + 1, 0) // BLOCK_K * BLOCK_K
    last = tl.minimum(newest + BLOCK_Q, S)
    whole = tl.cdiv(tl.maximum(newest + BLOCK_Q - full, 0), BLOCK_K) * BLOCK_K
    diagonal = tl.maximum((newest + 1) // BLOCK_K * BLOCK_K, whole)
    return first, whole, diagonal, last


@triton.jit
def counted(left, span, ramp, max_span):
    """Which pairs count at all, of those with `left` = span + ramp - distance; for them m = min(left / ramp, 1).

    Callers subtract integers first, so that left is small and exact on the ramp. Whether a key is later than the query,
    or max_span away, is asked half a position from where that changes.
    """
    return (left > tl.maximum(0.0, span + ramp - max_span + 0.5)) & (left < span + ramp + 0.5)


@triton.jit
def attend_span_tiles(
    maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, first, last, whole, gap, span, ramp, max_span, T, S,
    scale2, D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax of a query tile `q`, its rows `row`, over the tiles first, first + BLOCK_K, .. below last.

    All float32, over the keys seen so far: `maximum` [BLOCK_Q] of the base-2 scores q kᵀ scale2 + log2 m, before any
    -inf; `total` [BLOCK_Q] of the weights exp2(score - maximum); `acc` [BLOCK_Q, BLOCK_D], values summed with them.
    MASKED: m is as in `keys_in_reach`, and a key with m = 0 does not count, whatever is in it; a tile counted at whole
    or later lies `gap` further, behind those that are not masked. Else m is 1 everywhere, whole and gap are not used.
    Only where the weights meet v they take its dtype. k and v have strides of their own; no row from S on is loaded.
    """
    for place in range(first, last, BLOCK_K):
        start = place
        if MASKED:
            start = tl.where(place < whole, place, place + gap)
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        if MASKED:
            edge = span + ramp - (row + (S - T - start)).to(tl.float32)
            left = edge[:, None] + tl.arange(0, BLOCK_K)[None, :]
            scores += tl.log2(tl.minimum(left * (1.0 / ramp), 1.0))
            scores = tl.where(counted(left, span, ramp, max_span), scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        finite = new_maximum
        if MASKED:
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
    q_ptr, k_ptr, v_ptr, span_ptr, out_ptr, lse_ptr, q_stride, k_stride, v_stride, out_stride, heads, group, T, S, ramp,
    max_span, scale2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head. The last tiles see the most keys, so they start first."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    span = tl.minimum(tl.load(span_ptr + head), max_span, propagate_nan=tl.PropagateNan.ALL)
    k_ptr += head_start(batch, head // group, k_stride, D)
    v_ptr += head_start(batch, head // group, v_stride, D)
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + head_start(batch, head, q_stride, D), start, q_stride, T, D, BLOCK_Q, BLOCK_D)
    maximum = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    first, whole, diagonal, last = keys_in_reach(start, span, ramp, max_span, T, S, BLOCK_Q, BLOCK_K)
    gap = diagonal - whole
    if gap > 0:  # around a loop that may not run the sums are written on a second path, and each wgmma waits
        maximum, total, acc = attend_span_tiles(
            maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, whole, diagonal, whole, gap, span, ramp,
            max_span, T, S, scale2, D, BLOCK_K, False,
        )  # fmt: skip
    if last - gap > first:  # always so
        maximum, total, acc = attend_span_tiles(
            maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, first, last - gap, whole, gap, span, ramp,
            max_span, T, S, scale2, D, BLOCK_K, True,
        )  # fmt: skip
    acc = acc / total[:, None]  # a query counts itself; 0 / 0 if span + ramp is NaN or not above 0
    store_tile(out_ptr + head_start(batch, head, out_stride, D), acc, start, out_stride, T, D, BLOCK_Q, BLOCK_D)
    lse_ptr += tl.program_id(0).to(tl.int64) * T
    tl.store(lse_ptr + row, (maximum + tl.log2(total)) / LOG2E, mask=row < T)


@triton.jit
def query_gradient_tiles(
    dq, dspan, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, row, first, last, whole, gap, span, ramp,
    max_span, T, S, scale2, D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale [BLOCK_Q, BLOCK_D] and dspan * ramp [BLOCK_Q], increased by what these tiles give.

    Tiles as in `attend_span_tiles`. dspan sums p (dP - delta) over the ramp: m > 0 and distance >= span.
    """
    for place in range(first, last, BLOCK_K):
        start = place
        if MASKED:
            start = tl.where(place < whole, place, place + gap)
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, dq.shape[1], not MASKED)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, dq.shape[1], not MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse[:, None])
        dscores = tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None]
        if MASKED:
            edge = span + ramp - (row + (S - T - start)).to(tl.float32)
            left = edge[:, None] + tl.arange(0, BLOCK_K)[None, :]
            dscores = tl.where(counted(left, span, ramp, max_span), p * dscores, 0.0)
            dspan += tl.sum(tl.where(left <= ramp, dscores, 0.0), 1)
            dscores *= tl.minimum(left * (1.0 / ramp), 1.0)
        else:
            dscores = p * dscores
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq, dspan


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, span_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dspan_ptr, q_stride, k_stride, v_stride,
    dout_stride, dq_stride, heads, group, T, S, ramp, max_span, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: dQ of one tile of queries, and its part of its head's dspan, [B H, tiles]."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    span = tl.minimum(tl.load(span_ptr + head), max_span, propagate_nan=tl.PropagateNan.ALL)
    k_ptr += head_start(batch, head // group, k_stride, D)
    v_ptr += head_start(batch, head // group, v_stride, D)
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + head_start(batch, head, q_stride, D), start, q_stride, T, D, BLOCK_Q, BLOCK_D)
    dout = load_tile(dout_ptr + head_start(batch, head, dout_stride, D), start, dout_stride, T, D, BLOCK_Q, BLOCK_D)
    statistics = tl.program_id(0).to(tl.int64) * T
    lse, delta = load_statistics(lse_ptr + statistics, delta_ptr + statistics, row, T)
    first, whole, diagonal, last = keys_in_reach(start, span, ramp, max_span, T, S, BLOCK_Q, BLOCK_K)
    gap = diagonal - whole
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    dspan = tl.zeros((BLOCK_Q,), tl.float32)
    if gap > 0:
        dq, dspan = query_gradient_tiles(
            dq, dspan, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, row, whole, diagonal, whole, gap, span,
            ramp, max_span, T, S, scale2, D, BLOCK_K, False,
        )  # fmt: skip
    if last - gap > first:
        dq, dspan = query_gradient_tiles(
            dq, dspan, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, row, first, last - gap, whole, gap, span,
            ramp, max_span, T, S, scale2, D, BLOCK_K, True,
        )  # fmt: skip
    store_tile(dq_ptr + head_start(batch, head, dq_stride, D), dq * scale, start, dq_stride, T, D, BLOCK_Q, BLOCK_D)
    tl.store(dspan_ptr + tl.program_id(0) * tl.num_programs(1) + start // BLOCK_Q, tl.sum(dspan, 0) / ramp)


@triton.jit
def add_key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, dout_stride, start, column, span, ramp, max_span, T, S,
    scale2, D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv [BLOCK_K, BLOCK_D] of the keys `column`, increased by what the query tile at `start` gives."""
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr, start, q_stride, T, D, BLOCK_Q, dk.shape[1])
    lse, delta = load_statistics(lse_ptr, delta_ptr, row, T)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale2
    edge = span + ramp + (column + (T - S - start)).to(tl.float32)
    left = edge[:, None] - tl.arange(0, BLOCK_Q)[None, :]
    weights = tl.minimum(left * (1.0 / ramp), 1.0) * tl.exp2(scores - lse[None, :])
    weights = tl.where(counted(left, span, ramp, max_span), weights, 0.0)
    dout = load_tile(dout_ptr, start, dout_stride, T, D, BLOCK_Q, dk.shape[1])
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dscores = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def queries_in_reach(start, span, ramp, max_span, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(first, stop): the tiles of queries that read one of the keys from `start` on; at least one, if for nothing."""
    reach = tl.maximum(tl.minimum(tl.ceil(span + ramp).to(tl.int32), max_span), 1)
    first = tl.maximum(start + T - S, 0) // BLOCK_Q
    stop = tl.cdiv(tl.maximum(tl.minimum(start + BLOCK_K - 1 + reach + T - S, T), 1), BLOCK_Q)
    return first, tl.maximum(stop, first + 1)


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, span_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_stride, k_stride, v_stride,
    dout_stride, dk_stride, dv_stride, kv_heads, group, T, S, ramp, max_span, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of one tile of keys, summed over the `group` query heads that read them."""
    start = tl.program_id(1) * BLOCK_K
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    column = start + tl.arange(0, BLOCK_K)
    k = load_tile(k_ptr + head_start(batch, kv_head, k_stride, D), start, k_stride, S, D, BLOCK_K, BLOCK_D)
    v = load_tile(v_ptr + head_start(batch, kv_head, v_stride, D), start, v_stride, S, D, BLOCK_K, BLOCK_D)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    rounds = 0
    for member in range(0, group):
        span = tl.minimum(tl.load(span_ptr + kv_head * group + member), max_span, propagate_nan=tl.PropagateNan.ALL)
        first, stop = queries_in_reach(start, span, ramp, max_span, T, S, BLOCK_Q, BLOCK_K)
        rounds += stop - first
    head, tile, stop, span = kv_head * group - 1, 0, 0, 0.0
    for _ in range(0, rounds):  # nested loops over heads and tiles would take more registers
        if tile == stop:
            head += 1
            span = tl.minimum(tl.load(span_ptr + head), max_span, propagate_nan=tl.PropagateNan.ALL)
            tile, stop = queries_in_reach(start, span, ramp, max_span, T, S, BLOCK_Q, BLOCK_K)
        statistics = (batch * kv_heads * group + head).to(tl.int64) * T
        dk, dv = add_key_gradients(
            dk, dv, k, v, q_ptr + head_start(batch, head, q_stride, D),
            dout_ptr + head_start(batch, head, dout_stride, D), lse_ptr + statistics, delta_ptr + statistics,
            q_stride, dout_stride, tile * BLOCK_Q, column, span, ramp, max_span, T, S, scale2, D, BLOCK_Q,
        )  # fmt: skip
        tile += 1
    store_tile(dk_ptr + head_start(batch, kv_head, dk_stride, D), dk * scale, start, dk_stride, S, D, BLOCK_K, BLOCK_D)
    store_tile(dv_ptr + head_start(batch, kv_head, dv_stride, D), dv, start, dv_stride, S, D, BLOCK_K, BLOCK_D)


class SpanAttention(torch.autograd.Function):
    """The differentiable pair: keeps q, k, v, span, out and lse for the backward pass, and nothing of size T x S."""

    @staticmethod
    def forward(ctx, q, k, v, span, ramp, max_span, scale, block_q, block_k):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        options = span_options("forward", q, block_q, block_k)
        (B, H, T, _), (Hkv, S) = q.shape, k.shape[1:3]
        forward_kernel[(B * H, triton.cdiv(T, options["BLOCK_Q"]))](
            q, k, v, span, out, lse, q.stride(), k.stride(), v.stride(), out.stride(), H, H // Hkv, T, S, float(ramp),
            max_span, scale * LOG2E.value, **options,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, span)
        ctx.options = (ramp, max_span, scale, block_q, block_k)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        dout = dout if loadable(dout) else dout.contiguous()
        gradients = span_attention_backward(dout, *ctx.saved_tensors, *ctx.options)
        return *gradients, None, None, None, None, None


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, span: Tensor, ramp: int = 32, max_span: int | None = None,
    scale: float | None = None, block_q: int | None = None, block_k: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out = Σ m exp(s) v / Σ m exp(s), like q, and lse = log Σ m exp(s), `[B, H, T]` float32. out is differentiable.

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]`, S >= T, of the same dtype; span float32 `[H]`, tokens; s = scale q kᵀ,
    scale 1/√D and max_span S if None; m as in `keys_in_reach`. block_q and block_k, powers of two from 16 to 256,
    replace the tile chosen for the head size. What span holds is not looked at, it stays on the device: more than
    max_span counts as max_span, NaN gives NaN. Raises ValueError for shapes, strides, devices or options that do not
    fit, TypeError for dtypes.
    """
    max_span, scale = checked_spans(q, k, v, span, ramp, max_span, scale, block_q, block_k)
    return SpanAttention.apply(q, k, v, span, ramp, max_span, scale, block_q, block_k)


def span_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Tensor, ramp: int = 32,
    max_span: int | None = None, scale: float | None = None, block_q: int | None = None, block_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dspan) for dout, the gradient of out, by what `span_attention` took and gave. Raises as it does."""
    max_span, scale = checked_spans(q, k, v, span, ramp, max_span, scale, block_q, block_k, dout=dout, out=out)
    require_from_forward(q, dout, out, lse)
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    options = span_options("query gradient", q, block_q, block_k)
    (B, H, T, _), (Hkv, S), tiles = q.shape, k.shape[1:3], triton.cdiv(q.shape[2], options["BLOCK_Q"])
    dspan = torch.empty((B, H, tiles), dtype=torch.float32, device=q.device)
    delta_kernel[(B * H, triton.cdiv(T, 32))](
        dout, out, delta, dout.stride(), out.stride(), H, T, options["D"], options["BLOCK_D"], BLOCK_Q=32
    )
    common = (H // Hkv, T, S, float(ramp), max_span, scale, scale * LOG2E.value)
    query_gradient_kernel[(B * H, tiles)](
        q, k, v, span, dout, lse, delta, dq, dspan, q.stride(), k.stride(), v.stride(), dout.stride(), dq.stride(), H,
        *common, **options,
    )  # fmt: skip
    options = span_options("key gradient", q, block_q, block_k)
    key_gradient_kernel[(B * Hkv, triton.cdiv(S, options["BLOCK_K"]))](
        q, k, v, span, dout, lse, delta, dk, dv, q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride(),
        dv.stride(), Hkv, *common, **options,
    )  # fmt: skip
    return dq, dk, dv, dspan.sum((0, 2))


CASES = [  # Llama-2-7B, Llama-3-8B and other head sizes
    span_case("8192 tokens, 32 heads of 128", span_attention, 32, 32, 8192, 128),
    span_case("8192 tokens, 32 heads of 128, 8 for keys", span_attention, 32, 8, 8192, 128),
    span_case("4096 tokens, 32 heads of 64", span_attention, 32, 32, 4096, 64),
    span_case("4096 tokens, 16 heads of 256", span_attention, 16, 16, 4096, 256),
    span_case("4001 tokens, 32 heads of 80", span_attention, 32, 32, 4001, 80),
    span_backward_case("backward, 4096 tokens, 32 heads of 128", span_attention_backward, 32, 8, 4096, 128),
    span_backward_case("backward, 4096 tokens, 32 heads of 64", span_attention_backward, 32, 32, 4096, 64),
]
