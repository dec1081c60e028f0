"""Causal linear attention in Triton, chunked, forward and backward: one pass for the states, one for the rest.

Fused: q kᵀ and its mask inside a chunk of C tokens, the product with the state before it, the denominator, and the
division. First each head is walked along once, with 64 × 64 of the state S = Σ k vᵀ in a program's registers, in
float32; before every chunk it is left in memory, rounded. Then all chunks are computed side by side, without a loop.
Backward the same twice: queries meet the state of the keys before them; keys that of the queries after them, R = Σ q gᵀ
and r = Σ δ q with g = dout / total and δ = g·out. Sums have one order and nothing is atomic: same input, same bits.

With e bytes a number and rows = B H T:
    floor       e rows (2 F + 2 D) + 4 rows bytes: q, k, v in, out and float32 total out, each once;
                backward e rows (4 F + 4 D) + 4 rows: q, k, v, out, dout, dq, dk, dv
    moved       forward e rows (F + D) more to sum k and v (again for each 64 of D and F, from L2), and
                2 e rows F D / C for the states, written and read: 2.5 times the floor for F = D = 128 and C = 64.
                Backward e rows (3 F + 4 D + 4 F D / C) more, 2.9 times the floor; on sm_80 C is 32 there
    operations  4 F D for each token (state added to, state read), 2 (F + D) C for the pairs of its chunk, half of them
                masked. Backward 10 F D (S and R summed, read for dq, dk, dv) and 6 (F + D) C
Replaces tril(q kᵀ) v / rows' sums, which writes and reads T x T weights: 4 e rows T bytes. Carrying the state on
chip in one pass would move the floor alone, but the 32 programs of a text of 32 heads fill a quarter of a GPU; that
walk in segments, tried first, held S, out and weights in registers at once and spilled.

16-bit numbers: weights are divided by the denominator before they are rounded, the state is kept as the mean over its
tokens, so neither grows with the text. float32 goes without tensor cores ("ieee"); at F = D = 128
it spills: right, but not fast.
Layout: features q, k [B, H, T, F] and v [B, H, T, D], float16, bfloat16 or float32, F and D up to 128; any strides with
a contiguous last axis (multiples of 8 if that axis is one). The feature map is not fused: one more pass over q and k.
Method: Katharopoulos et al. 2020, arXiv:2006.16236, section 3.3; chunks as in Hua et al. 2022, arXiv:2202.10447.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.guard import require, require_dtype
from kernels.shared.linear_chunks import EPS, backward_case, checked, empty_states, forward_case, launch_options
from kernels.shared.tiles import head_start, load_tile, loadable, store_tile, tile_offsets


@triton.jit
def share_of_queries(q, denominator, length):
    """length q / denominator in q's dtype: 16 bits hold it, since the denominator sums up to `length` keys."""
    return (q.to(tl.float32) * (length / denominator)[:, None]).to(q.dtype)


@triton.jit
def load_part(ptr, start, stride, length, SIZE: tl.constexpr, left, CHUNK: tl.constexpr, PART: tl.constexpr):
    """Rows start .. start + CHUNK of PART of a head's SIZE columns, of which `left` remain; zero outside."""
    pointers = ptr + tile_offsets(start, stride, SIZE, CHUNK, PART)
    live = (start + tl.arange(0, CHUNK) < length)[:, None]
    if SIZE % PART != 0:
        live = live & (tl.arange(0, PART) < left)[None, :]
    return tl.load(pointers, mask=live, other=0.0)


@triton.jit
def load_state(
    state_ptr, sum_ptr, state_stride, sum_stride, batch, head, chunk, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A chunk's state [BLOCK_F, BLOCK_D], rounded, and its float32 vector [BLOCK_F]."""
    state_ptr += head_start(batch, head, state_stride, BLOCK_D) + chunk.to(tl.int64) * BLOCK_F * BLOCK_D
    state = tl.load(state_ptr + tl.arange(0, BLOCK_F)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])
    sum_ptr += head_start(batch, head, sum_stride, BLOCK_F) + chunk * BLOCK_F
    return state, tl.load(sum_ptr + tl.arange(0, BLOCK_F))


@triton.jit
def state_kernel(
    x_ptr, y_ptr, total_ptr, delta_ptr, state_ptr, sum_ptr, x_stride, y_stride, state_stride, sum_stride, heads, T,
    F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    PART_F: tl.constexpr, PART_D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """One program: PART_F x PART_D of the states of one head, forwards, of keys x and values y: their mean so far.

    QUERIES: backwards, of queries x and gradients y: R. The vector, z or r, is left by the first part of y.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    part_f, part_d = tl.program_id(1) * PART_F, tl.program_id(2) * PART_D
    x_ptr += head_start(batch, head, x_stride, F) + part_f
    y_ptr += head_start(batch, head, y_stride, D) + part_d
    near, column_f, column_d = tl.arange(0, CHUNK), tl.arange(0, PART_F), tl.arange(0, PART_D)
    state_ptr += head_start(batch, head, state_stride, BLOCK_D) + part_f * BLOCK_D + part_d
    state_ptr += column_f[:, None] * BLOCK_D + column_d[None, :]
    sum_ptr += head_start(batch, head, sum_stride, BLOCK_F) + part_f + column_f
    rows_before = tl.program_id(0).to(tl.int64) * T
    state = tl.zeros((PART_F, PART_D), tl.float32)
    total = tl.zeros((PART_F,), tl.float32)
    chunks = tl.cdiv(T, CHUNK)
    for step in range(0, chunks):
        chunk = chunks - 1 - step if QUERIES else step
        row = chunk * CHUNK + near
        before = 1.0 / T if QUERIES else 1.0 / tl.maximum(chunk * CHUNK, 1)
        tl.store(state_ptr + chunk.to(tl.int64) * BLOCK_F * BLOCK_D, (state * before).to(state_ptr.dtype.element_ty))
        if part_d == 0:
            tl.store(sum_ptr + chunk * BLOCK_F, total)
        x = load_part(x_ptr, chunk * CHUNK, x_stride, T, F, F - part_f, CHUNK, PART_F)
        y = load_part(y_ptr, chunk * CHUNK, y_stride, T, D, D - part_d, CHUNK, PART_D)
        share, weight = x, x.to(tl.float32)
        if QUERIES:
            denominator = tl.load(total_ptr + rows_before + row, mask=row < T, other=1.0)
            weight *= tl.load(delta_ptr + rows_before + row, mask=row < T, other=0.0)[:, None]
            share = share_of_queries(x, denominator, T)
        state = tl.dot(tl.trans(share), y, state, input_precision="ieee")
        total += tl.sum(weight, 0)


@triton.jit
def attend_chunk(mean, total, q, k, v, seen, eps, CHUNK: tl.constexpr):
    """(out [CHUNK, BLOCK_D], denominator [CHUNK]) of a chunk's queries, float32, from its tiles and the state before.

    mean [BLOCK_F, BLOCK_D], the mean of k vᵀ in q's dtype, and total [BLOCK_F], the sum of k in float32, over the
    `seen` tokens before the chunk (0 for the first; both are then zero); q, k [CHUNK, BLOCK_F] and v [CHUNK, BLOCK_D],
    zero past the end. A query sees those tokens and the keys of the chunk up to its own; its denominator is the sum
    of all these weights q·k, plus eps. Weights are float32; they are rounded to v's dtype only after they were
    divided, so that a large sum does not overflow 16 bits.
    """
    row = tl.arange(0, CHUNK)
    weights = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.where(row[:, None] >= row[None, :], weights, 0.0)
    denominator = tl.sum(weights, 1) + tl.sum(q.to(tl.float32) * total[None, :], 1) + eps
    acc = tl.dot(q, mean, input_precision="ieee") * (seen / denominator)[:, None]
    return tl.dot((weights / denominator[:, None]).to(v.dtype), v, acc, input_precision="ieee"), denominator


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, total_ptr, state_ptr, sum_ptr, q_stride, k_stride, v_stride, out_stride, state_stride,
    sum_stride, heads, T, eps,
    F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one head."""
    chunk, start = tl.program_id(1), tl.program_id(1) * CHUNK
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    mean, total = load_state(state_ptr, sum_ptr, state_stride, sum_stride, batch, head, chunk, BLOCK_F, BLOCK_D)
    q = load_tile(q_ptr + head_start(batch, head, q_stride, F), start, q_stride, T, F, CHUNK, BLOCK_F)
    k = load_tile(k_ptr + head_start(batch, head, k_stride, F), start, k_stride, T, F, CHUNK, BLOCK_F)
    v = load_tile(v_ptr + head_start(batch, head, v_stride, D), start, v_stride, T, D, CHUNK, BLOCK_D)
    out, denominator = attend_chunk(mean, total, q, k, v, start, eps, CHUNK)
    store_tile(out_ptr + head_start(batch, head, out_stride, D), out, start, out_stride, T, D, CHUNK, BLOCK_D)
    row = start + tl.arange(0, CHUNK)
    tl.store(total_ptr + tl.program_id(0).to(tl.int64) * T + row, denominator, mask=row < T)


@triton.jit
def query_gradient_kernel(
    k_ptr, v_ptr, dout_ptr, out_ptr, dq_ptr, total_ptr, delta_ptr, state_ptr, sum_ptr, k_stride, v_stride, dout_stride,
    out_stride, dq_stride, state_stride, sum_stride, heads, T,
    F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: dQ of one chunk; it leaves δ = dout·out / denominator for the gradients of the keys."""
    chunk, start = tl.program_id(1), tl.program_id(1) * CHUNK
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    mean, total = load_state(state_ptr, sum_ptr, state_stride, sum_stride, batch, head, chunk, BLOCK_F, BLOCK_D)
    dout = load_tile(dout_ptr + head_start(batch, head, dout_stride, D), start, dout_stride, T, D, CHUNK, BLOCK_D)
    out = load_tile(out_ptr + head_start(batch, head, out_stride, D), start, out_stride, T, D, CHUNK, BLOCK_D)
    common = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    v = load_tile(v_ptr + head_start(batch, head, v_stride, D), start, v_stride, T, D, CHUNK, BLOCK_D)
    k = load_tile(k_ptr + head_start(batch, head, k_stride, F), start, k_stride, T, F, CHUNK, BLOCK_F)
    near = tl.arange(0, CHUNK)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee") - common[:, None]
    dweights = tl.where(near[:, None] >= near[None, :], dweights, 0.0).to(k.dtype)
    dq = tl.dot(dout, tl.trans(mean), input_precision="ieee") * start - common[:, None] * total[None, :]
    dq = tl.dot(dweights, k, dq, input_precision="ieee")
    row, rows_before = start + near, tl.program_id(0).to(tl.int64) * T
    denominator = tl.load(total_ptr + rows_before + row, mask=row < T, other=1.0)
    dq_ptr += head_start(batch, head, dq_stride, F)
    store_tile(dq_ptr, dq / denominator[:, None], start, dq_stride, T, F, CHUNK, BLOCK_F)
    tl.store(delta_ptr + rows_before + row, common / denominator, mask=row < T)


@triton.jit
def chunk_key_gradients(rest, total, q, k, v, dout, denominator, delta, length, CHUNK: tl.constexpr):
    """dk [CHUNK, BLOCK_F] and dv [CHUNK, BLOCK_D] of a chunk's keys, float32, from its tiles and the queries after it.

    rest [BLOCK_F, BLOCK_D], R = Σ q doutᵀ / denominator in q's dtype, and total [BLOCK_F], r = Σ δ q in float32, over
    the queries after the chunk; q, k [CHUNK, BLOCK_F], v, dout [CHUNK, BLOCK_D]; denominator, delta (δ) [CHUNK]
    float32. Zero (denominator: one) past the end. Key s gets from query t >= s, in the chunk or after it:
    dk_s += (dout_t·v_s / denominator_t − δ_t) q_t and dv_s += (q_t·k_s / denominator_t) dout_t.
    q / denominator may be too small for 16 bits: `share_of_queries` gives `length` times it. q·k may be too large:
    like all products it is float32, and divided before it is rounded.
    """
    near = tl.arange(0, CHUNK)
    seen = near[:, None] <= near[None, :]  # [keys, queries]
    # Both kinds of weights come before all sums: else Triton 3.6 rounds some between the wgmma that read them (C7519).
    dweights = tl.dot(v, tl.trans(dout), input_precision="ieee") - (delta * denominator)[None, :]
    dweights = tl.where(seen, dweights, 0.0).to(q.dtype)
    weights = tl.dot(k, tl.trans(q), input_precision="ieee") / denominator[None, :]
    weights = tl.where(seen, weights, 0.0).to(dout.dtype)
    share = share_of_queries(q, denominator, length)
    dk = tl.dot(dweights, share, input_precision="ieee") * (1.0 / length)
    dk = tl.dot(v, tl.trans(rest), dk, input_precision="ieee")
    dv = tl.dot(k, rest, input_precision="ieee")
    dv = tl.dot(weights, dout, dv, input_precision="ieee")
    return dk - total[None, :], dv


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, total_ptr, delta_ptr, state_ptr, sum_ptr, q_stride, k_stride,
    v_stride, dout_stride, dk_stride, dv_stride, state_stride, sum_stride, heads, T,
    F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of one chunk of one head."""
    chunk, start = tl.program_id(1), tl.program_id(1) * CHUNK
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    rest, total = load_state(state_ptr, sum_ptr, state_stride, sum_stride, batch, head, chunk, BLOCK_F, BLOCK_D)
    row, rows_before = start + tl.arange(0, CHUNK), tl.program_id(0).to(tl.int64) * T
    denominator = tl.load(total_ptr + rows_before + row, mask=row < T, other=1.0)
    delta = tl.load(delta_ptr + rows_before + row, mask=row < T, other=0.0)
    q = load_tile(q_ptr + head_start(batch, head, q_stride, F), start, q_stride, T, F, CHUNK, BLOCK_F)
    k = load_tile(k_ptr + head_start(batch, head, k_stride, F), start, k_stride, T, F, CHUNK, BLOCK_F)
    v = load_tile(v_ptr + head_start(batch, head, v_stride, D), start, v_stride, T, D, CHUNK, BLOCK_D)
    dout = load_tile(dout_ptr + head_start(batch, head, dout_stride, D), start, dout_stride, T, D, CHUNK, BLOCK_D)
    dk, dv = chunk_key_gradients(rest, total, q, k, v, dout, denominator, delta, T, CHUNK)
    store_tile(dk_ptr + head_start(batch, head, dk_stride, F), dk, start, dk_stride, T, F, CHUNK, BLOCK_F)
    store_tile(dv_ptr + head_start(batch, head, dv_stride, D), dv, start, dv_stride, T, D, CHUNK, BLOCK_D)


def sum_states(
    x: Tensor, y: Tensor, total: Tensor, delta: Tensor, options: dict, states: tuple[Tensor, Tensor], queries: bool
) -> tuple:
    """Fill `states` for keys x and values y, or queries x and gradients y; the last arguments of the next launch."""
    (B, H, T, _), (state, vector) = x.shape, states
    part_f, part_d = (min(64, options[name]) for name in ("BLOCK_F", "BLOCK_D"))
    state_kernel[(B * H, options["BLOCK_F"] // part_f, options["BLOCK_D"] // part_d)](
        x, y, total, delta, state, vector, x.stride(), y.stride(), state.stride(), vector.stride(), H, T,
        PART_F=part_f, PART_D=part_d, QUERIES=queries, **options | {"num_warps": 4, "num_stages": 3},
    )  # fmt: skip
    return state.stride(), vector.stride(), H, T


def chunked_forward(q: Tensor, k: Tensor, v: Tensor, chunk: int | None, eps: float) -> tuple[Tensor, Tensor]:
    """out and total for arguments that fit."""
    options = launch_options(q, v, checked(q, k, v, chunk))
    out, total = torch.empty_like(v), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    state, vector = states = empty_states(q, options)
    sizes = sum_states(k, v, total, total, options, states, queries=False)
    forward_kernel[state.shape[0] * state.shape[1], state.shape[2]](
        q, k, v, out, total, state, vector, q.stride(), k.stride(), v.stride(), out.stride(), *sizes, eps, **options
    )
    return out, total


class ChunkedAttention(torch.autograd.Function):
    """The differentiable pair: keeps q, k, v, out and total for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, chunk, eps):
        out, total = chunked_forward(q, k, v, chunk, eps)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(total)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        dout = dout if loadable(dout) else dout.contiguous()
        return *chunked_attention_backward(dout, *ctx.saved_tensors, ctx.chunk), None, None


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk: int | None = None, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Causal linear attention of features: out like v, and float32 total `[B, H, T]`, its denominators.

    q, k `[B, H, T, F]`; v `[B, H, T, D]` of the same dtype; F and D up to 128. Differentiable through out. chunk:
    16, 32 or 64 tokens; None chooses by dtype, pass and GPU. Raises ValueError for shapes, strides, devices or
    options that do not fit, TypeError for dtypes.
    """
    checked(q, k, v, chunk)
    require(0 <= eps < float("inf"), f"eps must be 0 or more and finite, got {eps}")
    return ChunkedAttention.apply(q, k, v, chunk, eps)


def chunked_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for the gradient `dout` of out, from what `chunked_attention` took and gave. Raises as it does."""
    options = launch_options(q, v, checked(q, k, v, chunk, backward=True, dout=dout, out=out))
    for name, tensor in (("dout", dout), ("out", out)):
        require(tensor.shape == v.shape, f"{name} must have v's shape {tuple(v.shape)}, got {tuple(tensor.shape)}")
    require_dtype((torch.float32,), total=total)
    require(total.shape == q.shape[:3], f"total must be {tuple(q.shape[:3])}, got {tuple(total.shape)}")
    require(total.is_contiguous(), f"total must be contiguous, got strides {total.stride()}")
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(total)
    state, vector = states = empty_states(q, options)
    grid = (state.shape[0] * state.shape[1], state.shape[2])
    sizes = sum_states(k, v, total, delta, options, states, queries=False)
    query_gradient_kernel[grid](
        k, v, dout, out, dq, total, delta, state, vector, k.stride(), v.stride(), dout.stride(), out.stride(),
        dq.stride(), *sizes, **options,
    )  # fmt: skip
    sizes = sum_states(q, dout, total, delta, options, states, queries=True)  # the keys' states have been read
    key_gradient_kernel[grid](
        q, k, v, dout, dk, dv, total, delta, state, vector, q.stride(), k.stride(), v.stride(), dout.stride(),
        dk.stride(), dv.stride(), *sizes, **options,
    )  # fmt: skip
    return dq, dk, dv


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out alone, as the cases call it."""
    return chunked_attention(q, k, v)[0]


CASES = [  # features as many as channels, as elu gives them
    forward_case("4096 tokens, 32 heads of 128", attend, 32, 4096, 128),
    forward_case("32768 tokens, 32 heads of 128", attend, 32, 32768, 128),
    forward_case("4096 tokens, 32 heads of 64", attend, 32, 4096, 64),
    forward_case("4001 tokens, 32 heads of 80", attend, 32, 4001, 80),
    backward_case("backward, 4096 tokens, 32 heads of 128", chunked_attention_backward, 32, 4096, 128),
    backward_case("backward, 4096 tokens, 32 heads of 64", chunked_attention_backward, 32, 4096, 64),
]
