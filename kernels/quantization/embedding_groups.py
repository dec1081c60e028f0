"""Activations to codes of 8 bits or fewer, channels put in the order of their groups on the way: static PEG.

Fused: the permutation, division, rounding, clipping and the narrowing to a byte. What an integer product reads next
then stands by group, so that a tile of its sum has one scale.

    bytes        tokens · channels · (b + 1)  +  2 channels         b bytes of x, one of the code; order and grids
    operations   about ten a value, none of a matrix product      floor: bytes / bandwidth
Not fast yet where memory is: 34 machine instructions a value, a third the division (triton 3.7.1, bfloat16, sm_90;
counted, not timed), of which an H200 can do about 20 while it moves 3 bytes.
Replaces x[:, order], then (x / scale).round() + zero, clip, and the conversion: each reads and writes all values,
about 4 b + 1 more bytes a value than the floor.

A row is loaded as it stands in memory, 128 bits a thread, and permuted on chip: a permuted load would fetch a sector of
32 bytes for each value of 2. Order, 16 bits a channel, and grids are loaded again for each of ROWS tokens, not held:
they come from the L1 cache, and for long rows the registers that would hold them do not suffice.
Rounding is that of the reference to the bit: an IEEE division, and ties to even by adding 1.5 · 2^23, where a float
counts in ones; the quotient is clipped first, so that the sum is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

ONES = tl.constexpr(1.5 * 2**23)
LARGEST = 16384  # channels whose row fits on chip


@triton.jit
def quantize_kernel(
    x_ptr, order_ptr, scale_ptr, zero_ptr, codes_ptr, tokens, channels, size, HIGHEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens a program, a whole row of x at a time; size channels make a group, HIGHEST is the largest code.

    order is int16. Codes are those of `quantize_groups`, to the bit: IEEE division in float32, ties to even.
    """
    place = tl.arange(0, BLOCK)
    inside = place < channels
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, tokens)):
        order = tl.load(order_ptr + place, mask=inside, other=0)
        x = tl.load(x_ptr + row * channels + place, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + place // size, mask=inside, other=1.0)
        zero = tl.load(zero_ptr + place // size, mask=inside, other=0.0)
        quotient = tl.div_rn(tl.gather(x, order.to(tl.int32), axis=0).to(tl.float32), scale)
        quotient = tl.minimum(tl.maximum(quotient, -zero), HIGHEST - zero)
        code = (quotient + ONES) - ONES + zero
        tl.store(codes_ptr + row * channels + place, code.to(tl.uint8), mask=inside)


def quantize_groups(
    x: Tensor, order: Tensor, scale: Tensor, zero: Tensor, bits: int = 8, rows: int | None = None
) -> Tensor:
    """Codes uint8 `[tokens, channels]` of x, by place: code[t, i] = clip(rint(x[t, order[i]] / scale) + zero).

    x       float16, bfloat16 or float32 `[tokens, channels]`, contiguous, finite; at most 16,384 channels
    order   int64 `[channels]`, a permutation (not checked on the device)
    scale, zero  float32 `[groups]`, groups dividing the channels; zero holds integers from 0 to 2**bits − 1
    rows    tokens of a program, instead of what fits the size

    Arithmetic is float32, as the reference's with float32 arguments. Raises ValueError or TypeError for anything else.
    """
    require(x.dim() == 2 and order.dim() == 1, f"x must be [tokens, channels], order [channels], got {x.dim()} axes")
    (tokens, channels), groups = x.shape, scale.numel()
    require(0 < channels <= LARGEST, f"x must have 1 to {LARGEST} channels, got {channels}")
    require(order.shape == (channels,), f"order must have the {channels} channels of x, got {tuple(order.shape)}")
    require(scale.shape == zero.shape == (groups,), f"scale and zero must be [groups], got {tuple(zero.shape)}")
    require(groups > 0 and channels % groups == 0, f"groups must divide the {channels} channels, got {groups}")
    require(bits in range(1, 9), f"bits must be an integer from 1 to 8, got {bits}")
    require_dtype((torch.float16, torch.bfloat16, torch.float32), x=x)
    require_dtype((torch.int64,), order=order)
    require_dtype((torch.float32,), scale=scale, zero=zero)
    require_contiguous(x=x, order=order, scale=scale, zero=zero)
    require_launchable(x=x, order=order, scale=scale, zero=zero)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if tokens:
        rows = rows or max(1, min(8, tokens // 1024))
        block = triton.next_power_of_2(channels)
        meta = {"HIGHEST": 2**bits - 1, "ROWS": rows, "BLOCK": block, "num_warps": max(1, min(16, block // 512))}
        args = x, order.to(torch.int16), scale, zero, codes, tokens, channels, channels // groups
        quantize_kernel[(triton.cdiv(tokens, rows),)](*args, **meta)
    return codes


def by_torch(x: Tensor, order: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """`quantize_groups` by plain torch operators."""
    grouped = x[:, order].float().unflatten(1, (len(scale), -1))
    codes = (grouped / scale[:, None]).round() + zero[:, None]
    return codes.clamp(0, 2**bits - 1).to(torch.uint8).flatten(1)


def arguments(tokens: int, channels: int, groups: int, device: torch.device) -> tuple:
    """Those of `quantize_groups` in bfloat16, with contents on a GPU only."""
    x = torch.empty(tokens, channels, dtype=torch.bfloat16, device=device)
    order = torch.arange(channels, device=device)
    scale, zero = torch.empty(2, groups, device=device).unbind()
    if device.type == "cuda":
        x.normal_()
        order = torch.randperm(channels, device=device)
        scale.uniform_(0.01, 0.05)
        zero.random_(0, 256)
    return x, order, scale, zero, 8


def llama_case(tokens: int, channels: int, groups: int) -> Case:
    """The input of a linear layer of Llama-7B in 8 bits."""
    return Case(
        name=f"{tokens} x {channels}, {groups} groups",
        inputs=lambda device: arguments(tokens, channels, groups, device),
        run=quantize_groups,
        expected=by_torch,
        bytes=3 * tokens * channels + 2 * channels,
        operations=0,
        kind="stream",
        peers={"torch": by_torch},
    )


CASES = [llama_case(tokens, channels, 8) for tokens in (16, 4096) for channels in (4096, 11008)]
