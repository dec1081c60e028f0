"""Quantize and pack in one pass: find each group's range, round to its grid, store the codes bit after bit.

    bytes        N K s  +  N K bits / 8  +  5 N K / n        x, s bytes a number; codes; scales in float32 and zeros
    operations   about 10 N K                                floor: bytes / bandwidth
An H200 can do some 20 instructions for a number while it moves 2.5 to 3 bytes. There are 16 in rows of 4096 to 8 bits,
24 in groups of 128 to 4 bits, asymmetric (triton 3.7.1, bfloat16, sm_90; counted, not timed): the latter wait for them.
Fused: the extremes of a group, its scale and zero, rounding, packing. Its numbers are loaded once and stay in registers
until the grid is known. With one operator after the other x is read for the range and again to be rounded, and the
codes are written, read, and written again packed: at least 2 N K s + 2 N K + N K bits / 8 bytes.
One program holds whole groups, so no grid for a whole tensor is made here: its range would have to be found first.

Codes must be the reference's to the last one, ties included:
- the quotient is x times a reciprocal, one for each group, and that is divided exactly (`tl.div_rn`);
- it is clipped before it is rounded. The ends of a grid are integers: that changes no code, and what is left is small
  enough to be rounded by an addition. At 1.5 · 2^23 a float32 counts in ones, ties go to the even number, and the last
  bits of the sum are the integer, which nothing has to convert;
- zero is added to that integer. Added to the number, an odd zero would turn the ties around;
- no product stands right before an addition: a fused multiply-add would leave out its rounding.

x `[N, K]` lies in memory as groups of n numbers, n = K for grids of tokens or channels. An int32 word takes 32 / bits
codes, the first in its lowest bits, and three words take 32 codes of 3 bits. n · bits is a multiple of 32, so that no
word is shared by two groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BITS = (2, 3, 4, 8)
LONGEST = 32768  # numbers of a group: what the registers of one program hold
TINY = tl.constexpr(2.0**-126)  # the least normal float32
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23
ROUNDER_BITS = tl.constexpr(0x4B400000)  # the same as bits
# For each symmetric scheme: how many steps its ends miss 2^(bits − 1), and what it makes of a range without negatives.
SYMMETRIC = {
    "gptq": (0.5, 0.5, 0.5),
    "torch": (0.5, 0.5, 1.0),
    "smoothquant": (1, 1, 1.0),
    "deepspeed": (0, 0, 1.0),
    "no_clipping": (1, 0, 1.0),
}


@triton.jit
def rint_bits(x):
    """x, float32 of at most 2^22, rounded to int32, halves to the even number."""
    return (x + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def find_grid(low, high, up, down, positive, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale (float32) and zero (int32) for ranges from low <= 0 to high >= 0; up, down: steps from 0 to the ends.

    positive: factor of a range without negative numbers. A scale that is too small to divide by becomes 1.
    """
    if SYMMETRIC:
        high = tl.where(low < 0, high, high * positive)
        scale = tl.maximum(tl.div_rn(high, up), tl.div_rn(-low, down))
    else:
        scale = tl.div_rn(high - low, up)
    scale = tl.where(scale < TINY, 1.0, scale)
    if SYMMETRIC:
        zero = tl.full(scale.shape, 1 << (BITS - 1), tl.int32)
    else:
        zero = rint_bits(tl.minimum(tl.div_rn(-low, scale), up))
    return scale, zero


@triton.jit
def store_codes(packed_ptr, code, part, live, n, BITS: tl.constexpr):
    """Store codes [PARTS, BLOCK] of groups `part` as words: one of 32 / BITS codes, three of 32 codes of 3 bits."""
    PARTS: tl.constexpr = code.shape[0]
    BLOCK: tl.constexpr = code.shape[1]
    CODES: tl.constexpr = 32 // (BITS + BITS % 2)  # eight of 3 bits, as of 4
    bits = code.reshape(PARTS, BLOCK // CODES, CODES) << (BITS * tl.arange(0, CODES))[None, None, :]
    word = tl.sum(bits, axis=2)  # of 3 bits, 24 in a word so far
    if BITS == 3:
        even, odd = tl.split(word.reshape(PARTS, BLOCK // 32, 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        index = tl.arange(0, BLOCK // 32)
        at = packed_ptr + part[:, None] * (n // 32 * 3) + index[None, :] * 3
        live = live[:, None] & (index < n // 32)[None, :]
        tl.store(at, first | second << 24, mask=live)
        tl.store(at + 1, second >> 8 | third << 16, mask=live)
        tl.store(at + 2, third >> 16 | fourth << 8, mask=live)
    else:
        index = tl.arange(0, BLOCK // CODES)
        at = packed_ptr + part[:, None] * (n // CODES) + index[None, :]
        tl.store(at, word, mask=live[:, None] & (index < n // CODES)[None, :])


@triton.jit
def quantize_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, groups, n, up, down, positive,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: PARTS of the groups, each n numbers of x that lie one after the other, padded to BLOCK.

    Writes the scale (float32), the zero (uint8) and the packed codes (int32 words, n · BITS / 32 a group) of each. A
    group with a number that is not finite gets the scale NaN or infinity, which is seen as soon as it is used.
    up, down, positive: as in `find_grid`; asymmetric, up is 2^BITS − 1, and the others are not used.
    """
    part = tl.program_id(0).to(tl.int64) * PARTS + tl.arange(0, PARTS)
    live = part < groups
    column = tl.arange(0, BLOCK)
    at = x_ptr + part[:, None] * n + column[None, :]
    x = tl.load(at, mask=live[:, None] & (column < n)[None, :], other=0.0).to(tl.float32)
    low, high = tl.minimum(tl.min(x, axis=1), 0.0), tl.maximum(tl.max(x, axis=1), 0.0)
    scale, zero = find_grid(low, high, up, down, positive, BITS, SYMMETRIC)
    broken = tl.sum(x * 0.0, axis=1)  # 0, or NaN if a number is NaN, which minimum and maximum pass over
    tl.store(scale_ptr + part, scale + broken, mask=live)
    tl.store(zero_ptr + part, zero.to(tl.uint8), mask=live)
    least = -zero.to(tl.float32)
    steps = x * tl.div_rn(1.0, scale)[:, None]
    steps = tl.minimum(tl.maximum(steps, least[:, None]), (least + (2**BITS - 1))[:, None])
    store_codes(packed_ptr, rint_bits(steps) + zero[:, None], part, live, n, BITS)


def quantize_and_pack(
    x: Tensor, bits: int, group_size: int | None = None, scheme: str = "asymmetric", parts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes of x `[N, K]` on dynamic grids, one for each group of a row, or (None) for each row.

    x           float16, bfloat16 or float32, contiguous; computed in float32
    bits        2, 3, 4 or 8
    group_size  at most 32768; it divides K and, times bits, is a multiple of 32
    scheme      "asymmetric" or a key of SYMMETRIC, as in the chapter
    parts       groups of a program, a power of two, instead of those of `configuration`

    Returns packed uint8 `[N, K · bits / 8]`, scale float32 and zero uint8, both `[N, K / group_size]`. A kernel cannot
    stop at a number that is not finite: the scale of its group then is not, either.
    Raises ValueError or TypeError for anything else.
    """
    n = _checked(x, bits, group_size, scheme)
    rows, columns = x.shape
    packed = torch.empty((rows, columns * bits // 8), dtype=torch.uint8, device=x.device)
    scale = torch.empty((rows, columns // n), dtype=torch.float32, device=x.device)
    zero = torch.empty(scale.shape, dtype=torch.uint8, device=x.device)
    meta = configuration(n, bits)
    meta |= {"PARTS": parts or meta["PARTS"], "BITS": bits, "SYMMETRIC": scheme != "asymmetric"}
    launch = quantize_kernel[(triton.cdiv(scale.numel(), meta["PARTS"]),)]
    launch(x, packed.view(torch.int32), scale, zero, scale.numel(), n, *ends(bits, scheme), **meta)
    return packed, scale, zero


def ends(bits: int, scheme: str) -> tuple[float, float, float]:
    """What `find_grid` wants: up, down, positive."""
    if scheme == "asymmetric":
        return 2.0**bits - 1, 1.0, 1.0
    up, down, positive = SYMMETRIC[scheme]
    return 2.0 ** (bits - 1) - up, 2.0 ** (bits - 1) - down, positive


def configuration(n: int, bits: int) -> dict[str, Any]:
    """Tile and warps: 32 numbers a thread, four loads of 16 bytes in 16 bits; a small group is one of many."""
    block = max(32, triton.next_power_of_2(n))
    return {"PARTS": max(1, 4096 // block), "BLOCK": block, "num_warps": min(16, max(4, block // 1024))}


def _checked(x: Tensor, bits: int, group_size: int | None, scheme: str) -> int:
    """The numbers of a group, or the error that `quantize_and_pack` promises."""
    require(x.dim() == 2 and x.numel() > 0, f"x must be a non-empty matrix, got shape {tuple(x.shape)}")
    require(bits in BITS, f"bits must be one of {BITS}, got {bits}")
    known = ("asymmetric", *SYMMETRIC)
    require(scheme in known, f"scheme must be one of {', '.join(known)}, got {scheme!r}")
    n = x.shape[1] if group_size is None else group_size
    require(
        0 < n <= LONGEST and x.shape[1] % n == 0 and n * bits % 32 == 0,
        f"group_size must divide {x.shape[1]} columns, fill 32-bit words, be at most {LONGEST}; got {n}, {bits} bits",
    )
    require_dtype(DTYPES, x=x)
    require_contiguous(x=x)
    require_launchable(x=x)
    return n


def torch_quantize_and_pack(
    x: Tensor, bits: int, group_size: int | None = None, scheme: str = "asymmetric"
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by plain torch operators. Divisors are tensors, because by a number torch does not divide exactly."""
    groups = x.float().unflatten(1, (-1, group_size or x.shape[1]))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    up, down, positive = (torch.full_like(high, end) for end in ends(bits, scheme))
    if scheme == "asymmetric":
        scale = (high - low) / up
    else:
        scale = torch.maximum(torch.where(low < 0, high, high * positive) / up, -low / down)
    scale = torch.where(scale < TINY.value, torch.ones_like(scale), scale)
    middle = torch.full_like(scale, 2.0 ** (bits - 1))
    zero = (-low / scale).round().clamp(max=2**bits - 1) if scheme == "asymmetric" else middle
    codes = ((groups * (1 / scale)[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=x.device)
    stream = (codes[..., None] >> places[:bits] & 1).view(x.shape[0], -1, 8)
    return (stream << places).sum(-1, dtype=torch.uint8), scale, zero.to(torch.uint8)


@functools.cache
def compiled() -> Callable:
    """The same, fused by torch; made when it is first called, because torch's compiler takes seconds to import.

    It is told to divide exactly, as the operators do one by one: other codes would not be compared, let alone timed.
    """
    return torch.compile(torch_quantize_and_pack, options={"eager_numerics.division_rounding": True})


def llama_case(what: str, N: int, K: int, bits: int, group_size: int | None, scheme: str) -> Case:
    """Activations of a Llama-8B layer, a grid for each token, or one of its weights in groups; bfloat16."""

    def inputs(device: torch.device) -> tuple:
        x = torch.empty((N, K), dtype=torch.bfloat16, device=device)
        return (x.normal_() if device.type == "cuda" else x), bits, group_size, scheme

    return Case(
        name=f"{what} {N} x {K}, {bits} bits, {scheme}",
        inputs=inputs,
        run=quantize_and_pack,
        expected=torch_quantize_and_pack,
        bytes=2 * N * K + N * K * bits // 8 + 5 * N * K // (group_size or K),
        operations=10 * N * K,
        kind="stream",
        narrow_stores="" if group_size is None else "codes of 2 to 4 bits: a thread has 4 to 8 bytes of them",
        peers={"torch": torch_quantize_and_pack, "torch.compile": lambda *given: compiled()(*given)},
    )


CASES = [
    llama_case("tokens", 2048, 4096, 8, None, "smoothquant"),
    llama_case("tokens", 2048, 14336, 8, None, "asymmetric"),
    *(llama_case("g128", 14336, 4096, bits, 128, "asymmetric") for bits in (4, 3, 2)),
    llama_case("g32", 14336, 4096, 4, 32, "no_clipping"),
]
