"""FlashAttention in Triton: forward with log-sum-exp, and the backward pass that recomputes the scores.

Fused: Q Kᵀ, causal mask, softmax and the product with V. A program keeps one tile of queries on chip, streams keys and
values past it, and rescales its sums whenever the running maximum rises; the scores never reach memory. The backward
pass rebuilds each tile of P = exp(S - lse) twice: in programs that hold keys (dK, dV, summed over the query heads that
share them, so that K and V are never repeated) and in programs that hold queries (dQ).

With e bytes a number and `pairs` the visible (query, key) pairs, T S or, causal and square, T (T + 1) / 2:
    operations  forward 4 B H D pairs; backward 10 B H D pairs, and 4 more because S and dP are computed twice
    floor       forward e B D (2 H T + 2 Hkv S) + 4 B H T bytes: q, k, v in, out and lse out, each once
    read        K and V pass by once per query tile and head, mostly from L2; neighbouring programs share them
Replaces softmax(q @ k.mT * scale + mask) @ v, which writes and reads T x S scores and then weights: 4 e B H T S bytes
more, S / D times the whole floor. From T of a few hundred on, tensor cores and exp2 bound this kernel, not memory.

Steps taken, by the bfloat16 code for sm_90; no timing is behind them. A warp's instructions in the unmasked loop:
    loops entered only if they run           wgmma waits no more for the one before (C7515); forward D 128: 382 to 358
    head and tile counted, not divided out   dK, dV at D 128: 712 to 690, and 229 to 226 registers
and of one thread for each score, from sm_80's tiles to wider ones:
    forward D 64 9.5 to 7.1, D 256 44.6 to 27.0; dQ D 128 12.8 to 8.8, D 256 51.3 to 16.3;
    dK, dV D 64 20.6 to 18.0, D 128 43.1 to 22.9. At D 256 they stay on mma.sync, 98.8: wider ones spill or come close.

Layout: q [B, H, T, D]; k, v [B, Hkv, S, D], float16, bfloat16 or float32, D up to 256. Any strides with a contiguous
last axis (multiples of 8 if D is one), so that heads cut from a projection need no copy; `out` takes the strides of q.
Query head h reads key head h // (H / Hkv); causal means that query i sees the keys j <= i + S - T. Scores are kept in
base 2, where exp2 is one instruction: `scale2` = scale log2(e).
Method: Dao et al. 2022, arXiv:2205.14135; loop order and work split of Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.guard import require, require_dtype
from kernels.shared.attentions import backward_case, causal_case, checked_scale
from kernels.shared.flash_tiles import launch_options
from kernels.shared.tiles import head_start, load_tile, loadable, store_tile, visible, visible_keys

LOG2E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)


@triton.jit
def attend_tiles(
    maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, first, last, T, S, scale2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax of a query tile `q`, its rows `row`, over the keys first .. last: new (maximum, total, acc).

    All float32 and over the keys seen so far: `maximum` [BLOCK_Q] of the base-2 scores q kᵀ scale2, -inf before any;
    `total` [BLOCK_Q] of the weights exp2(score - maximum); `acc` [BLOCK_Q, BLOCK_D], the values summed with them.
    MASKED tiles cross the diagonal or the end of the keys and may show a row nothing; in the others all is visible.
    Only where the weights meet v they take its dtype. k and v have strides of their own; no row from S on is loaded.
    """
    for start in range(first, last, BLOCK_K):
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K], not yet scaled
        if MASKED:
            scores = tl.where(visible(start, row, T, S, BLOCK_K, CAUSAL), scores, -INFINITY)
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
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stride, k_stride, v_stride, out_stride, heads, group, T, S, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head. The last tiles see the most keys, so they start first."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    k_ptr += head_start(batch, head // group, k_stride, D)
    v_ptr += head_start(batch, head // group, v_stride, D)
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + head_start(batch, head, q_stride, D), start, q_stride, T, D, BLOCK_Q, BLOCK_D)
    maximum = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    whole, last = visible_keys(start, T, S, BLOCK_Q, BLOCK_K, CAUSAL)
    if whole > 0:  # around a loop that may not run the sums are written on a second path, and each wgmma waits
        maximum, total, acc = attend_tiles(
            maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, 0, whole, T, S, scale2, D, BLOCK_K, CAUSAL,
            False,
        )  # fmt: skip
    if last > whole:
        maximum, total, acc = attend_tiles(
            maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, whole, last, T, S, scale2, D, BLOCK_K,
            CAUSAL, True,
        )  # fmt: skip
    total = tl.where(total == 0, 1.0, total)  # a row that sees no key: out 0, lse still -inf; a NaN stays one
    acc = acc / total[:, None]
    store_tile(out_ptr + head_start(batch, head, out_stride, D), acc, start, out_stride, T, D, BLOCK_Q, BLOCK_D)
    lse_ptr += tl.program_id(0).to(tl.int64) * T
    tl.store(lse_ptr + row, (maximum + tl.log2(total)) / LOG2E, mask=row < T)


@triton.jit
def delta_kernel(
    dout_ptr, out_ptr, delta_ptr, dout_stride, out_stride, heads, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta [B, H, T], the sum over D of dout * out: how much of each row of dP its softmax takes back."""
    start = tl.program_id(1) * BLOCK_Q
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    dout = load_tile(dout_ptr + head_start(batch, head, dout_stride, D), start, dout_stride, T, D, BLOCK_Q, BLOCK_D)
    out = load_tile(out_ptr + head_start(batch, head, out_stride, D), start, out_stride, T, D, BLOCK_Q, BLOCK_D)
    row = start + tl.arange(0, BLOCK_Q)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + tl.program_id(0).to(tl.int64) * T + row, delta, mask=row < T)


@triton.jit
def load_statistics(lse_ptr, delta_ptr, row, T):
    """Base-2 lse and delta of some rows. A row that sees no key or does not exist has lse +inf: its weights are 0."""
    lse = tl.load(lse_ptr + row, mask=row < T, other=INFINITY) * LOG2E
    delta = tl.load(delta_ptr + row, mask=row < T, other=0.0)
    return tl.where(lse == -INFINITY, INFINITY, lse), delta


@triton.jit
def add_key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, dout_stride, start, column, T, S, scale2,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv [BLOCK_K, BLOCK_D] of the keys `column`, increased by what the query tile at `start` gives.

    Scores are held transposed, [BLOCK_K, BLOCK_Q], as both products that accumulate want them. All is float32, but
    what meets dout or q takes its dtype. q and dout have strides of their own; no row from T on is loaded.
    """
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr, start, q_stride, T, D, BLOCK_Q, dk.shape[1])
    lse, delta = load_statistics(lse_ptr, delta_ptr, row, T)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    if CAUSAL:
        scores = tl.where(column[:, None] <= row[None, :] + (S - T), scores, -INFINITY)
    else:
        scores = tl.where((column < S)[:, None], scores, -INFINITY)
    weights = tl.exp2(scores * scale2 - lse[None, :])
    dout = load_tile(dout_ptr, start, dout_stride, T, D, BLOCK_Q, dk.shape[1])
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dscores = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_stride, k_stride, v_stride, dout_stride,
    dk_stride, dv_stride, kv_heads, group, T, S, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of one tile of keys, summed over the `group` query heads that read them."""
    start = tl.program_id(1) * BLOCK_K
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    column = start + tl.arange(0, BLOCK_K)
    k = load_tile(k_ptr + head_start(batch, kv_head, k_stride, D), start, k_stride, S, D, BLOCK_K, BLOCK_D)
    v = load_tile(v_ptr + head_start(batch, kv_head, v_stride, D), start, v_stride, S, D, BLOCK_K, BLOCK_D)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first = 0  # the first query tile that sees one of these keys
    if CAUSAL:
        first = tl.maximum(start + T - S, 0) // BLOCK_Q
    head, tile, tiles = kv_head * group, first, tl.cdiv(T, BLOCK_Q)
    for _ in range(0, group * (tiles - first)):  # nested loops over heads and tiles would take 100 registers more
        statistics = (batch * kv_heads * group + head).to(tl.int64) * T
        dk, dv = add_key_gradients(
            dk, dv, k, v, q_ptr + head_start(batch, head, q_stride, D),
            dout_ptr + head_start(batch, head, dout_stride, D), lse_ptr + statistics, delta_ptr + statistics,
            q_stride, dout_stride, tile * BLOCK_Q, column, T, S, scale2, D, BLOCK_Q, CAUSAL,
        )  # fmt: skip
        head = tl.where(tile + 1 == tiles, head + 1, head)
        tile = tl.where(tile + 1 == tiles, first, tile + 1)
    store_tile(dk_ptr + head_start(batch, kv_head, dk_stride, D), dk * scale, start, dk_stride, S, D, BLOCK_K, BLOCK_D)
    store_tile(dv_ptr + head_start(batch, kv_head, dv_stride, D), dv, start, dv_stride, S, D, BLOCK_K, BLOCK_D)


@triton.jit
def query_gradient_tiles(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, row, first, last, T, S, scale2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale [BLOCK_Q, BLOCK_D], increased by what the keys first .. last give; MASKED as in `attend_tiles`."""
    for start in range(first, last, BLOCK_K):
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, dq.shape[1], not MASKED)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, dq.shape[1], not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(visible(start, row, T, S, BLOCK_K, CAUSAL), scores, -INFINITY)
        weights = tl.exp2(scores * scale2 - lse[:, None])
        dscores = weights * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, q_stride, k_stride, v_stride, dout_stride, dq_stride,
    heads, group, T, S, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: dQ of one tile of queries; same loop as `forward_kernel`."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    k_ptr += head_start(batch, head // group, k_stride, D)
    v_ptr += head_start(batch, head // group, v_stride, D)
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + head_start(batch, head, q_stride, D), start, q_stride, T, D, BLOCK_Q, BLOCK_D)
    dout = load_tile(dout_ptr + head_start(batch, head, dout_stride, D), start, dout_stride, T, D, BLOCK_Q, BLOCK_D)
    statistics = tl.program_id(0).to(tl.int64) * T
    lse, delta = load_statistics(lse_ptr + statistics, delta_ptr + statistics, row, T)
    whole, last = visible_keys(start, T, S, BLOCK_Q, BLOCK_K, CAUSAL)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    if whole > 0:
        dq = query_gradient_tiles(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, row, 0, whole, T, S, scale2, D, BLOCK_K, CAUSAL,
            False,
        )  # fmt: skip
    if last > whole:
        dq = query_gradient_tiles(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, row, whole, last, T, S, scale2, D, BLOCK_K,
            CAUSAL, True,
        )  # fmt: skip
    store_tile(dq_ptr + head_start(batch, head, dq_stride, D), dq * scale, start, dq_stride, T, D, BLOCK_Q, BLOCK_D)


class FlashAttention(torch.autograd.Function):
    """The differentiable pair: keeps q, k, v, out and lse for the backward pass, and nothing of size T x S."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, block_q, block_k):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        options = launch_options("forward", q, causal, block_q, block_k)
        (B, H, T, _), (Hkv, S) = q.shape, k.shape[1:3]
        forward_kernel[(B * H, triton.cdiv(T, options["BLOCK_Q"]))](
            q, k, v, out, lse, q.stride(), k.stride(), v.stride(), out.stride(), H, H // Hkv, T, S,
            scale * LOG2E.value, **options,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = (causal, scale, block_q, block_k)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        dout = dout if loadable(dout) else dout.contiguous()
        return *flash_attention_backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None, None


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ scale) v and its log-sum-exp: out like q, lse `[B, H, T]` float32. Differentiable through out.

    q `[B, H, T, D]`; k, v `[B, Hkv, S, D]` of the same dtype; scale 1/√D if None. A query that sees no key gets out 0
    and lse -inf. block_q and block_k, powers of two from 16 to 256, replace the tile chosen for the head size.
    Raises ValueError for shapes, strides, devices or options that do not fit, TypeError for dtypes.
    """
    scale = checked_scale(q, k, v, scale, block_q, block_k)
    return FlashAttention.apply(q, k, v, causal, scale, block_q, block_k)


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool = True,
    scale: float | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for the gradient `dout` of out, from what `flash_attention` took and gave. Raises as it does."""
    scale = checked_scale(q, k, v, scale, block_q, block_k, dout=dout, out=out)
    for name, tensor in (("dout", dout), ("out", out)):
        require(tensor.shape == q.shape, f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
    require_dtype((torch.float32,), lse=lse)
    require(lse.shape == q.shape[:3], f"lse must be {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    require(lse.is_contiguous(), f"lse must be contiguous, got strides {lse.stride()}")
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    (B, H, T, _), (Hkv, S), scale2 = q.shape, k.shape[1:3], scale * LOG2E.value
    options = launch_options("query gradient", q, causal, block_q, block_k)
    delta_kernel[(B * H, triton.cdiv(T, 32))](
        dout, out, delta, dout.stride(), out.stride(), H, T, options["D"], options["BLOCK_D"], BLOCK_Q=32
    )
    query_gradient_kernel[(B * H, triton.cdiv(T, options["BLOCK_Q"]))](
        q, k, v, dout, lse, delta, dq, q.stride(), k.stride(), v.stride(), dout.stride(), dq.stride(), H, H // Hkv,
        T, S, scale, scale2, **options,
    )  # fmt: skip
    options = launch_options("key gradient", q, causal, block_q, block_k)
    key_gradient_kernel[(B * Hkv, triton.cdiv(S, options["BLOCK_K"]))](
        q, k, v, dout, lse, delta, dk, dv, q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride(), dv.stride(),
        Hkv, H // Hkv, T, S, scale, scale2, **options,
    )  # fmt: skip
    return dq, dk, dv


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention without its lse, as the cases and the model call it."""
    return flash_attention(q, k, v)[0]


CASES = [  # Llama-2-7B, Llama-3-8B and other head sizes; training is the forward and the backward pass
    causal_case("4096 tokens, 32 heads of 128", attend, 32, 32, 4096, 128),
    causal_case("4096 tokens, 32 heads of 128, 8 for keys", attend, 32, 8, 4096, 128),
    causal_case("4096 tokens, 32 heads of 64", attend, 32, 32, 4096, 64),
    causal_case("4096 tokens, 16 heads of 256", attend, 16, 16, 4096, 256),
    causal_case("4001 tokens, 32 heads of 80", attend, 32, 32, 4001, 80),
    backward_case("backward, 32 heads of 128, 8 for keys", flash_attention_backward, 32, 8, 4096, 128),
    causal_case("training, 32 heads of 128, 8 for keys", attend, 32, 8, 4096, 128, gradient=True),
    causal_case("training, 32 heads of 64", attend, 32, 32, 4096, 64, gradient=True),
    causal_case("training, 16 heads of 256", attend, 16, 16, 4096, 256, gradient=True),
]
