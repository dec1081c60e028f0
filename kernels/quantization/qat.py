"""Fake quantization with a learned step (LSQ), forward and backward, each in one pass over the weights.

Fused: forward, the division, clipping, rounding and the product with the step, or (`lsq_codes`) the narrowing to a
byte. Backward, all that and the mask, the product with dy, and the sum over the numbers of a step.

    bytes        forward  2 s N + 4 G        x and y                 s bytes a number, N numbers, G steps
                 codes    (s + 1) N + 4 G    x and codes
                 backward 3 s N + 8 G        x, dy and dx; steps and their gradients
    operations   about ten a number, none of a matrix product: memory is the floor
Replaces one torch operator after the other: 8 s N bytes forward (divide, clamp, round, multiply), and about 20 s N
backward, which also holds the quotients, the mask and the rounding errors at once.

x lies in memory as G groups of n = N / G numbers, the whole layer if G is 1. A program has a tile of ROWS groups and
BLOCK of their numbers, so that short groups fill it, too, and a long one is cut into blocks. dscale is then a sum over
blocks: every program writes its own share, and a second kernel adds the shares of a group in their order. No atomics,
so the same input gives the same bits. Where a group fits in a block its share is the sum.
Rounding is the reference's to the bit: an IEEE division, and ties to even by adding 1.5 · 2^23, where a float counts in
ones; the quotient is clipped first, so that the sum is exact. NaN in x or dy spreads, to codes it has no meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ONES = tl.constexpr(1.5 * 2**23)
AREA = 4096  # numbers of a program: 16 a thread, two loads of 128 bits from each matrix of 16-bit numbers


@triton.jit
def find_tile(groups, n, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's groups `[ROWS]` and their mask, offsets of its numbers `[ROWS, BLOCK]` and theirs, its block."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    live = (row < groups)[:, None] & (column < n)[None, :]
    return row, row < groups, row[:, None] * n + column[None, :], live, program % blocks


@triton.jit
def nearest(q, LOW: tl.constexpr, HIGH: tl.constexpr):
    """q clipped and rounded, halves to the even number. Comparisons with NaN are false, so that it stays NaN."""
    clipped = tl.where(q < LOW, LOW, tl.where(q > HIGH, HIGH, q))
    return (clipped + ONES) - ONES


@triton.jit
def lsq_kernel(
    x_ptr, scale_ptr, y_ptr, groups, n, blocks, LOW: tl.constexpr, HIGH: tl.constexpr, CODES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes, or the values that they stand for, of one tile of x `[groups, n]`; scale `[groups]`."""
    row, rows_live, offset, live, _ = find_tile(groups, n, blocks, ROWS, BLOCK)
    scale = tl.load(scale_ptr + row, mask=rows_live, other=1.0)[:, None]
    x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
    code = nearest(tl.div_rn(x, tl.broadcast_to(scale, (ROWS, BLOCK))), LOW, HIGH)
    y = code if CODES else code * scale
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def gradient_kernel(
    x_ptr, scale_ptr, dy_ptr, dx_ptr, share_ptr, groups, n, blocks, factor, LOW: tl.constexpr, HIGH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one tile of x `[groups, n]`, and its shares of dscale times factor: one entry of each row of share.

    x, dy, dx `[groups, n]`, scale `[groups]`, share `[groups, blocks]`. With q = x / scale, dx is dy where
    LOW <= q <= HIGH, else 0. A share is factor · Σ dy · (nearest(q) − q inside, LOW below, HIGH above), in float32.
    """
    row, rows_live, offset, live, block = find_tile(groups, n, blocks, ROWS, BLOCK)
    scale = tl.load(scale_ptr + row, mask=rows_live, other=1.0)[:, None]
    x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offset, mask=live, other=0.0)
    q = tl.div_rn(x, tl.broadcast_to(scale, (ROWS, BLOCK)))
    outside = (q < LOW) | (q > HIGH)
    tl.store(dx_ptr + offset, tl.where(outside, 0.0, dy).to(dx_ptr.dtype.element_ty), mask=live)
    change = nearest(q, LOW, HIGH) - tl.where(outside, 0.0, q)
    share = factor * tl.sum(dy.to(tl.float32) * change, axis=1)
    tl.store(share_ptr + row * blocks + block, share, mask=rows_live)


@triton.jit
def combine_kernel(share_ptr, dscale_ptr, blocks, BLOCK: tl.constexpr):
    """dscale of one group, the sum of its shares `[blocks]`, always in the same order."""
    group = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        acc += tl.load(share_ptr + group * blocks + block, mask=block < blocks, other=0.0)
    tl.store(dscale_ptr + group, tl.sum(acc, axis=0))


def limits(bits: int, signed: bool) -> tuple[int, int]:
    """(Qn, Qp) as the reference has them. ValueError for bits outside 2 .. 8, or 1 .. 8 if not signed."""
    least = 2 if signed else 1
    require(bits in range(least, 9), f"bits must be an integer from {least} to 8, got {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def require_fit(x: Tensor, scale: Tensor, **others: Tensor) -> None:
    """Raise ValueError or TypeError unless x can be cut into the groups of scale, and what is like x is like it."""
    require(scale.dim() == 1 and scale.numel() > 0, f"scale must be [groups], got {tuple(scale.shape)}")
    require(
        x.numel() > 0 and x.numel() % scale.numel() == 0,
        f"x must hold numbers that the {scale.numel()} steps of scale divide, got {x.numel()}",
    )
    for name, other in others.items():
        require(other.shape == x.shape, f"{name} must be shaped like x, {tuple(x.shape)}, got {tuple(other.shape)}")
        require_dtype((x.dtype,), **{name: other})
    require_dtype(DTYPES, x=x)
    require_dtype((torch.float32,), scale=scale)
    require_contiguous(x=x, scale=scale, **others)
    require_launchable(x=x, scale=scale, **others)


def tiling(groups: int, n: int, tile: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """Programs, blocks of a group, ROWS and BLOCK; `tile` (ROWS, BLOCK) instead of what fits the size."""
    widest = min(AREA, int(triton.next_power_of_2(n)))
    rows, block = tile or (min(AREA // widest, int(triton.next_power_of_2(groups))), widest)
    blocks = -(-n // block)
    return -(-groups // rows) * blocks, blocks, rows, block


def forward(x: Tensor, scale: Tensor, bits: int, signed: bool, y: Tensor, tile: tuple[int, int] | None) -> Tensor:
    """Fill y, of x's shape, with values (where its dtype is x's) or codes."""
    (low, high), groups = limits(bits, signed), scale.numel()
    n = x.numel() // groups
    programs, blocks, rows, block = tiling(groups, n, tile)
    meta = {"LOW": low, "HIGH": high, "CODES": y.dtype != x.dtype, "ROWS": rows, "BLOCK": block, "num_warps": 8}
    lsq_kernel[(programs,)](x, scale, y, groups, n, blocks, **meta)
    return y


def lsq(x: Tensor, scale: Tensor, bits: int, signed: bool = True, tile: tuple[int, int] | None = None) -> Tensor:
    """scale · rint(clip(x / scale, Qn, Qp)), like x in shape and dtype.

    x       float16, bfloat16 or float32 of any shape, contiguous, not empty; cut as `x.reshape(groups, -1)`
    scale   float32 `[groups]`, positive (not checked on the device)
    bits    2 to 8, or 1 to 8 for codes that are not signed
    tile    groups and numbers of a program, powers of two, instead of what fits the size

    Arithmetic is float32, as the reference's with float32 arguments. Raises ValueError or TypeError for anything else.
    """
    require_fit(x, scale)
    return forward(x, scale, bits, signed, torch.empty_like(x), tile)


def lsq_codes(x: Tensor, scale: Tensor, bits: int, signed: bool = True, tile: tuple[int, int] | None = None) -> Tensor:
    """The codes of `lsq`, int8, or uint8 if not signed, in the shape of x; x must be finite. Errors as there."""
    require_fit(x, scale)
    codes = torch.empty(x.shape, dtype=torch.int8 if signed else torch.uint8, device=x.device)
    return forward(x, scale, bits, signed, codes, tile)


def lsq_gradient(
    x: Tensor, scale: Tensor, dy: Tensor, bits: int, signed: bool = True, tile: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients (dx like x, dscale float32 `[groups]`) from dy at `lsq(x, scale, bits, signed)`; dy as x.

    dx is dy where Qn <= x / scale <= Qp, else 0; dscale is summed over a group, in float32, and divided by √(n · Qp).
    The same arguments give the same bits. Errors as `lsq`.
    """
    require_fit(x, scale, dy=dy)
    (low, high), groups = limits(bits, signed), scale.numel()
    n = x.numel() // groups
    programs, blocks, rows, block = tiling(groups, n, tile)
    dx = torch.empty_like(x)
    share = torch.empty(groups, blocks, dtype=torch.float32, device=x.device)
    meta = {"LOW": low, "HIGH": high, "ROWS": rows, "BLOCK": block, "num_warps": 8}
    gradient_kernel[(programs,)](x, scale, dy, dx, share, groups, n, blocks, 1 / math.sqrt(n * high), **meta)
    if blocks == 1:
        return dx, share.view(groups)
    dscale = torch.empty_like(scale)
    combine_kernel[(groups,)](share, dscale, blocks, BLOCK=min(1024, triton.next_power_of_2(blocks)))
    return dx, dscale


def codes_by_torch(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`lsq_codes` by plain torch operators."""
    q = x.reshape(len(scale), -1) / scale[:, None]
    return q.clamp(*limits(bits, True)).round().to(torch.int8).view_as(x)


def by_torch(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`lsq` by plain torch operators."""
    q = x.reshape(len(scale), -1) / scale[:, None]
    return (scale[:, None] * q.clamp(*limits(bits, True)).round()).view_as(x).to(x.dtype)


def gradient_by_torch(x: Tensor, scale: Tensor, dy: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`lsq_gradient` by plain torch operators."""
    (low, high), q = limits(bits, True), x.reshape(len(scale), -1).float() / scale[:, None]
    inside = (q >= low) & (q <= high)
    change = torch.where(inside, q.round() - q, q.clamp(low, high))
    dscale = (dy.view_as(q) * change).sum(1) / math.sqrt(q.shape[1] * high)
    return torch.where(inside.view_as(x), dy, 0), dscale


def arguments(rows: int, columns: int, groups: int, device: torch.device, backward: bool = False) -> tuple:
    """Those of `lsq` or of `lsq_gradient` in bfloat16 and 4 bits, with contents on a GPU only."""
    x, dy = (torch.empty(rows, columns, dtype=torch.bfloat16, device=device) for _ in range(2))
    scale = torch.empty(groups, device=device)
    if device.type == "cuda":
        x.normal_()
        dy.copy_(x).add_(torch.randn_like(x))  # a part of it in the direction of x, so that dscale is not noise
        scale.uniform_(0.2, 0.5)
    return (x, scale, dy, 4) if backward else (x, scale, 4)


def for_fake_quantize(x: Tensor, scale: Tensor, bits: int) -> tuple:
    """The arguments of torch's own operator: its zeros, its axis, its ends."""
    return x, scale, torch.zeros_like(scale, dtype=torch.int32), 0, *limits(bits, True)


RUNS: dict[str, tuple[Callable, Callable, int]] = {  # the wrapper, the same by torch, bytes a weight in 16 bits
    "forward": (lsq, by_torch, 4),
    "codes": (lsq_codes, codes_by_torch, 3),
    "backward": (lsq_gradient, gradient_by_torch, 6),
}


def llama_case(what: str, rows: int, columns: int, groups: int) -> Case:
    """A weight of Llama-7B, one step for it all, for each row, or for 128 neighbours; `what` is one of RUNS."""
    run, expected, size = RUNS[what]
    own = groups == rows and what == "forward"  # torch has an operator of its own for a step for each row
    return Case(
        name=f"{what}, {rows} x {columns}, {groups} steps",
        inputs=lambda device: arguments(rows, columns, groups, device, what == "backward"),
        run=run,
        expected=expected,
        bytes=size * rows * columns + (8 if what == "backward" else 4) * groups,
        operations=0,
        kind="stream",
        peers={"torch": expected} | ({"fake_quantize": torch.fake_quantize_per_channel_affine} if own else {}),
        prepare={"fake_quantize": for_fake_quantize} if own else {},
    )


SIZES = [(4096, 4096, 1), (4096, 4096, 4096), (4096, 4096, 4096 * 32), (4096, 11008, 4096), (11008, 4096, 11008)]
CASES = [llama_case(what, *size) for what in RUNS for size in (SIZES[1:2] if what == "codes" else SIZES)]
