"""Linformer in Triton: keys and values projected into slots by one launch, attention to the slots by another.

Fused: E K and F V in one launch, padding included; q keysᵀ, softmax and the product with the values in the other. Two
launches and not one, because no query may start before the last token has been added to every slot.

Projection. A program sums up to 64 slots of one head's keys, or of its values, over a run of positions, in registers:
a tile of E meets a tile of K once for each program. Where B Hkv heads and their tiles of slots are too few to fill the
GPU, positions are split into runs; each leaves float32 sums, and `sum_kernel` adds them in one order: nothing is
atomic, the same input gives the same bits.
Attention. Up to 128 slots, 32 KB of keys: a program loads all slots of its head once and lets tiles of queries pass. A
row of scores is whole, so its softmax needs no running maximum. The scores of more slots do not fit into registers (of
256 they spill or come close): those go to the FlashAttention kernel, tile by tile.

With e bytes a number:
    floor       e (2 B H T D + 2 B Hkv S D + 2 slots S) bytes: q, k, v, E and F in, out out, each once
    moved       4 e B Hkv slots D more for slots written and read; K and V again for each 64 slots, E and F for each
                head, out of L2. Runs: 16 B Hkv slots D for each one, if there are two or more
    operations  4 B Hkv slots S D for the slots, 4 B H T slots D for the attention: linear in T and S
Replaces softmax(q (E k)ᵀ) (F v) by operators, which writes and reads T x slots scores and weights: 4 e B H T slots
bytes, slots / D times the whole floor. Each half does about `slots` operations for a byte of the floor: up to 128 slots
memory bounds it on an H200, from about 200 on tensor cores do.

Layout: q [B, H, T, D]; k, v [B, Hkv, S, D], any strides with a contiguous last axis (multiples of 8 if that axis is
one); e, f [slots, L] or [Hkv, slots, L], contiguous, L >= S (a multiple of 16 to be loaded 128 bits at a time); mask
[B, S] bool, contiguous: no row that it hides is read. Scores are in base 2: `scale2` = scale log2(e). A NaN that no
mask hides reaches every query of its head; the reference refuses it, here nobody looks.
Method: Wang et al. 2020, arXiv:2006.04768, section 4.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.flash import flash_attention
from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.shared.attentions import checked_scale
from kernels.shared.tiles import aligned, has_warpgroup_products, head_start, load_tile, store_tile

LOG2E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)
ON_CHIP, MOST_SLOTS = 32768, 128  # bytes of a head's keys, and slots, that a program holds while queries pass
PROGRAMS = 264  # two for each of 132 multiprocessors


@triton.jit
def project_tiles(
    acc, x_ptr, e_ptr, mask_ptr, step, row, first, last, S, L, slots, D: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """acc [rows, BLOCK_D], float32, plus what positions first .. last of one head add to its slots `row`: e[i, s] x[s].

    x_ptr [S, D], rows `step` numbers apart; e_ptr [slots, L], L >= S. Positions come BLOCK at a time; the TAIL crosses
    the end of the text, and nothing from S on counts, in x or e, nor any row from `slots` on. MASKED: mask_ptr [S]
    uint8, 0 where a position is padding; its row of x is not read and counts as zero.
    """
    near, column = tl.arange(0, BLOCK), tl.arange(0, acc.shape[1])
    e_ptr += row.to(tl.int64)[:, None] * L + near[None, :]
    for start in range(first, last, BLOCK):
        live, inside = (column < D)[None, :], (row < slots)[:, None]
        if TAIL:
            live, inside = live & (start + near < S)[:, None], inside & (start + near < S)[None, :]
        if MASKED:
            token = tl.load(mask_ptr + start + near, mask=start + near < S, other=0) != 0
            live = live & token[:, None]
        rows = x_ptr + tl.full((), start, tl.int64) * step
        x = tl.load(rows + near[:, None] * step + column[None, :], mask=live, other=0.0)
        e = tl.load(e_ptr + start, mask=inside, other=0.0)
        acc = tl.dot(e, x, acc, input_precision="ieee")
    return acc


@triton.jit
def project_kernel(
    k_ptr, v_ptr, e_ptr, f_ptr, mask_ptr, out_ptr, k_stride, v_stride, head_step, heads, S, L, slots, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS slots of the keys of one head, or of its values, over one run of positions.

    program_id(0): batch * heads + head. program_id(1): tiles of slots, `parts` of the keys, then those of the values.
    program_id(2): the run, whole tiles of BLOCK positions. out [runs, kinds, B, heads, slots, D], contiguous; kinds 1
    or 2, keys before values. head_step: numbers from one head's e to the next one's, 0 if they share it.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    kind, run, runs = tl.program_id(1) // parts, tl.program_id(2), tl.num_programs(2)
    row = tl.program_id(1) % parts * ROWS + tl.arange(0, ROWS)
    of_keys = kind == 0
    x_ptr = tl.where(
        of_keys, k_ptr + head_start(batch, head, k_stride, D), v_ptr + head_start(batch, head, v_stride, D)
    )
    step = tl.where(of_keys, aligned(k_stride[2], D), aligned(v_stride[2], D))
    e_ptr = tl.where(of_keys, e_ptr, f_ptr) + head.to(tl.int64) * head_step
    mask_ptr += batch.to(tl.int64) * S
    tiles = tl.cdiv(S, BLOCK)
    first, last = run * tiles // runs * BLOCK, (run + 1) * tiles // runs * BLOCK
    whole = tl.minimum(last, S // BLOCK * BLOCK)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if whole > first:  # around a loop that may not run the sums are written on a second path, and each wgmma waits
        acc = project_tiles(
            acc, x_ptr, e_ptr, mask_ptr, step, row, first, whole, S, L, slots, D, BLOCK, MASKED, False
        )  # fmt: skip
    if last > whole:
        acc = project_tiles(acc, x_ptr, e_ptr, mask_ptr, step, row, whole, last, S, L, slots, D, BLOCK, MASKED, True)
    kinds = tl.num_programs(1) // parts
    place = ((run * kinds + kind).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * slots
    column = tl.arange(0, BLOCK_D)
    out_ptr += place * D + (row[:, None] * D + column[None, :])
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=(row < slots)[:, None] & (column < D)[None, :])


@triton.jit
def sum_kernel(parts_ptr, out_ptr, size, runs, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of out [size], each the sum over the runs of parts [runs, size], float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for run in range(0, runs):
        acc += tl.load(parts_ptr + tl.full((), run, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def attend_kernel(
    q_ptr, keys_ptr, values_ptr, out_ptr, q_stride, keys_stride, values_stride, out_stride, heads, group, T, slots,
    scale2, D: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs(1)-th tile of BLOCK_Q queries of the head program_id(0), and all its slots.

    Query head h reads the slots of head h // group; out = softmax of (q keysᵀ scale2 in base 2) times values. SLOTS
    is a power of two, those from `slots` on get no weight. Sums are float32, weights meet the values in their dtype.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    keys_ptr += head_start(batch, head // group, keys_stride, D)
    values_ptr += head_start(batch, head // group, values_stride, D)
    q_ptr += head_start(batch, head, q_stride, D)
    out_ptr += head_start(batch, head, out_stride, D)
    keys = load_tile(keys_ptr, 0, keys_stride, slots, D, SLOTS, BLOCK_D)
    values = load_tile(values_ptr, 0, values_stride, slots, D, SLOTS, BLOCK_D)
    live = (tl.arange(0, SLOTS) < slots)[None, :]
    for tile in range(tl.program_id(1), tl.cdiv(T, BLOCK_Q), tl.num_programs(1)):
        q = load_tile(q_ptr, tile * BLOCK_Q, q_stride, T, D, BLOCK_Q, BLOCK_D)
        scores = tl.where(live, tl.dot(q, tl.trans(keys), input_precision="ieee") * scale2, -INFINITY)
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])  # there is a slot: the maximum is finite
        total = tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        store_tile(out_ptr, acc / total[:, None], tile * BLOCK_Q, out_stride, T, D, BLOCK_Q, BLOCK_D)


def padded(size: int) -> int:
    """The next power of two, at least 16."""
    return 1 << max(4, (size - 1).bit_length())


def checked_projection(x: Tensor, e: Tensor, mask: Tensor | None, name: str) -> None:
    """ValueError or TypeError for an e or a mask that does not fit x `[B, Hkv, S, D]`."""
    require_dtype((x.dtype,), **{name: e})
    require_contiguous(**{name: e})
    B, Hkv, S, _ = x.shape
    shape = tuple(e.shape)
    require(
        len(shape) in (2, 3) and 0 not in shape and shape[-1] >= S and (len(shape) == 2 or shape[0] == Hkv),
        f"{name} must be [slots, L] or [{Hkv}, slots, L] with L at least {S}, got {shape}",
    )
    require_launchable(k=x, **{name: e})
    if mask is not None:
        require_dtype((torch.bool,), mask=mask)
        require(mask.shape == (B, S), f"mask must be {(B, S)}, got {tuple(mask.shape)}")
        require_contiguous(mask=mask)
        require_launchable(k=x, mask=mask)


def slots_of(k: Tensor, v: Tensor, e: Tensor, f: Tensor, mask: Tensor | None, kinds: int, runs: int | None) -> Tensor:
    """`[kinds, B, Hkv, slots, D]`: slots of k by e and, if there are two kinds, of v by f. The arguments fit."""
    (B, Hkv, S, D), (slots, L) = k.shape, e.shape[-2:]
    rows, block = (64, 64 if has_warpgroup_products() else 32) if k.dtype != torch.float32 else (16, 32)
    parts, tiles = -(-slots // rows), -(-S // block)
    runs = min(tiles, runs or max(1, min(PROGRAMS // (B * Hkv * kinds * parts), tiles // 8)))
    out = torch.empty((kinds, B, Hkv, slots, D), dtype=k.dtype, device=k.device)
    sums = out if runs == 1 else torch.empty((runs, *out.shape), dtype=torch.float32, device=k.device)
    project_kernel[(B * Hkv, kinds * parts, runs)](
        k, v, e, f, e if mask is None else mask.view(torch.uint8), sums, k.stride(), v.stride(),
        0 if e.dim() == 2 else slots * L, Hkv, S, L, slots, parts, D=D, BLOCK_D=padded(D), ROWS=rows, BLOCK=block,
        MASKED=mask is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    if runs > 1:
        sum_kernel[(triton.cdiv(out.numel(), 1024),)](sums, out, out.numel(), runs, BLOCK=1024, num_warps=4)
    return out


def project(x: Tensor, e: Tensor, mask: Tensor | None = None, runs: int | None = None) -> Tensor:
    """Slots `[B, Hkv, slots, D]` of keys or values x `[B, Hkv, S, D]`, D up to 128: Σ_s e[i, s] x_s, in x's dtype.

    e, mask as in the file's layout. runs: into how many the positions are split; None: as many as fill a GPU. Raises
    ValueError for shapes, strides, devices or options that do not fit, TypeError for dtypes.
    """
    checked_scale(x, x, x, None, None, None)
    checked_projection(x, e, mask, "e")
    require(x.shape[3] <= 128, f"D must be at most 128, got {x.shape[3]}")
    require(runs is None or runs >= 1, f"runs must be at least 1, got {runs}")
    return slots_of(x, x, e, e, mask, 1, runs)[0]


def attend_slots(
    q: Tensor, keys: Tensor, values: Tensor, scale: float | None = None, block_q: int | None = None
) -> Tensor:
    """softmax(scale q keysᵀ) values, out like q: q `[B, H, T, D]`, keys and values `[B, Hkv, slots, D]` of its dtype.

    D up to 128; scale 1/√D if None; block_q, queries of a tile, a power of two from 16 on, replaces the one chosen.
    Raises ValueError or TypeError for others.
    """
    scale = checked_scale(q, keys, values, scale, block_q, None)
    (B, H, T, D), (Hkv, slots) = q.shape, keys.shape[1:3]
    require(D <= 128, f"D must be at most 128, got {D}")
    if slots > MOST_SLOTS or padded(slots) * padded(D) * q.element_size() > ON_CHIP:
        return flash_attention(q, keys, values, False, scale, block_q)[0]
    out = torch.empty_like(q)
    block = block_q or (64 if q.dtype != torch.float32 else 16)
    programs = min(triton.cdiv(T, block), triton.cdiv(PROGRAMS, B * H))
    attend_kernel[(B * H, programs)](
        q, keys, values, out, q.stride(), keys.stride(), values.stride(), out.stride(), H, H // Hkv, T, slots,
        scale * LOG2E.value, D=D, BLOCK_D=padded(D), SLOTS=padded(slots), BLOCK_Q=block,
        num_warps=4 if has_warpgroup_products() else 8, num_stages=2,
    )  # fmt: skip
    return out


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e: Tensor,
    f: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of every query to the slots of all tokens, out like q; not causal. Not differentiable.

    Arguments as in the file's layout, all of one dtype, D up to 128; f None: e; scale 1/√D if None. Raises ValueError
    for shapes, strides, devices or options that do not fit, TypeError for dtypes.
    """
    f = e if f is None else f
    checked_scale(q, k, v, scale, None, None)
    checked_projection(k, e, mask, "e")
    checked_projection(v, f, mask, "f")
    require(e.shape == f.shape, f"e and f must have one shape, got {tuple(e.shape)} and {tuple(f.shape)}")
    require(q.shape[3] <= 128, f"D must be at most 128, got {q.shape[3]}")
    return attend_slots(q, *slots_of(k, v, e, f, mask, 2, None), scale)


def in_torch(
    q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor, mask: Tensor | None = None, precise: bool = False
) -> Tensor:
    """The same by torch's operators; `precise`: in float32."""
    dtype = q.dtype
    if precise:
        q, k, v, e, f = (x.float() for x in (q, k, v, e, f))
    if mask is not None:
        k, v = (x.masked_fill(~mask[:, None, :, None], 0) for x in (k, v))
    S, grouped = k.shape[2], q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, e[..., :S] @ k, f[..., :S] @ v, enable_gqa=grouped).to(dtype)


def case(name: str, heads: int, kv_heads: int, length: int, slots: int, D: int, padding: int | None = None) -> Case:
    """One layer over one text, in bfloat16, with projections for up to 4096 or 32768 tokens that all heads share.

    padding: how many tokens at the end are, with a mask that says so.
    """
    longest = 4096 if length <= 4096 else 32768

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        make = torch.empty if device.type == "cpu" else torch.randn
        shapes = [(1, n, length, D) for n in (heads, kv_heads, kv_heads)] + [(slots, longest)] * 2
        tensors = [make(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        for e in tensors[3:]:
            e /= math.sqrt(length)
        mask = () if padding is None else (torch.arange(length, device=device)[None] < length - padding,)
        return (*tensors, *mask)

    return Case(
        name,
        inputs=inputs,
        run=linformer_attention,
        expected=partial(in_torch, precise=True),
        bytes=2 * (2 * heads * length * D + 2 * kv_heads * length * D + 2 * slots * longest)
        + length * (padding is not None),
        operations=4 * slots * length * D * (heads + kv_heads),
        kind="matrix",
        tolerance=2e-2,
        peers={"matmul, SDPA": in_torch},
    )


CASES = [
    case("4096 tokens, 32 heads of 128, 128 slots", 32, 32, 4096, 128, 128),
    case("4096 tokens, 32 heads of 128, 256 slots", 32, 32, 4096, 256, 128),
    case("32768 tokens, 32 heads of 128, 8 for keys, 128 slots", 32, 8, 32768, 128, 128),
    case("4096 tokens, 32 heads of 64, 256 slots, a quarter padding", 32, 32, 4096, 256, 64, padding=1024),
    case("4001 tokens, 32 heads of 80, 100 slots", 32, 32, 4001, 100, 80),
]
