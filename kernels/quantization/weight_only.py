"""Weight-only product x @ Wᵀ with W in 4 bits: GPTQ's kernel, and that of every quantizer that ends in codes and grids.

Fused: unpacking, scale * (code - zero), and the product. The weights cross the memory bus once, as nibbles;
unpacked they never leave the chip. Decoding reads every weight for each token and does two
operations with it, so a quarter of the bytes is up to four times the speed.

    bytes        N K / 2  +  3 N K / g  +  2 M (K + N)      codes, 16-bit scales and 8-bit zeros, activations
    operations   2 M N K                                    floor: the larger of bytes / bandwidth, operations / rate
Replaces x @ dequantize(W).T, which moves 4.5 N K bytes if W is unpacked for the call, 2 N K if it is kept in 16 bits.

One row of x        `matvec_kernel`: no tensor cores, every program takes the whole K of a few rows of W. K is split
                    between its threads, whose sums meet on chip: no partial sum goes to memory.
2 to 16 rows        `matmul_kernel`, tiles padded to 16 rows, K split between programs until 128 of them are at work;
                    each writes its partial sum in float32 and `combine_kernel` adds them. Without atomics, so that the
                    order of the sum, and the result to the last bit, is the same in every run.
more                the same, one program per output tile where there are 128 tiles.

At so few operations per byte, instructions are the other limit. A code therefore becomes a float by one AND-OR into the
bits of a bias, and up to 16 rows the scale, the zero and that bias are applied to sums, not to weights:

    sum of scale * (code - zero) * x  =  scale * (sum of (bias + code) * x  -  (bias + zero) * sum of x)

Machine instructions in the loop per weight, all included (triton 3.7.1, bfloat16, sm_90; counted, not timed): one row
4.4, up to 16 rows 4.5; on sm_80, where AND and OR stay two, 5.4 and 5.2.

Layout: packed `[N, K / 8]` int32, K-major. Four words, 16 bytes, are one 128-bit load and hold 32 neighbouring columns:
nibble i of word w is column 4 i + w of its 32 (nibble 0 is the lowest). One shift of the four words thus gives four
neighbouring columns, and four neighbouring activations. scale, zero `[N, K / g]`; g, a multiple of 32, divides K.
Method: split-K and unpacking on chip as in Hoque et al. 2024, arXiv 2402.00025.
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

QUAD = tl.constexpr(32)  # columns in four words
# The bias of `pair_at`, and its bits twice.
BIASES = {torch.float16: (1024, 0x64006400), torch.bfloat16: (128, 0x43004300), torch.float32: (0, 0)}


@triton.jit
def counted(packed, bit: tl.constexpr, magic):
    """The code that begins at bit 19 of each int32 as 16 + code, or that at bit 15 as 16 + code / 16: float32, exact.

    A float from 16 to 32 counts in ones from its bit 19 up, in sixteenths from bit 15: OR-ed into the bits of 16.0, a
    code is added to it. Those are magic; not a constant, for two would not fit one AND-OR instruction, mask and magic.
    """
    return (packed & (15 << bit) | magic).to(tl.float32, bitcast=True)


@triton.jit
def by_place(x):
    """x [BLOCK_Q, 32] -> eight [BLOCK_Q, 4]: what meets nibble 0 of the four words, nibble 1, ..

    Neighbouring threads load neighbouring bytes of x, and hand them over on chip to those whose codes meet them.
    """
    x = x.reshape(x.shape[0], 2, 2, 2, 4).permute(0, 4, 1, 2, 3)
    even, odd = tl.split(x)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def matvec_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, N, quads, groups, magic,
    GROUP_QUADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of W times the vector x, BLOCK_Q quads of columns at a time; magic: bits of 16.0."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row64 = row.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    for start in range(0, quads, BLOCK_Q):
        quad = start + tl.arange(0, BLOCK_Q)
        live = (row < N)[:, None] & (quad < quads)[None, :]
        group = row64 * groups + (quad // GROUP_QUADS)[None, :]
        scale = tl.load(scale_ptr + group, mask=live, other=0.0)
        zero = tl.load(zero_ptr + group, mask=live, other=0)
        address = (row64 * quads + quad[None, :])[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        packed = tl.load(packed_ptr + address, mask=live[:, :, None], other=0)  # [BLOCK_N, BLOCK_Q, 4]
        column = quad[:, None] * QUAD + tl.arange(0, QUAD)[None, :]
        x = tl.load(x_ptr + column, mask=(quad < quads)[:, None], other=0.0)
        total = tl.sum(x.to(tl.float32), axis=1)
        # What 16.0 adds to the products: 16 x at bit 19; at bit 15, where x is taken 16 times, 256 x.
        surplus = tl.sum(x.to(tl.float32) * tl.where(column // 4 % 2 == 0, 256.0, 16.0), axis=1)
        x = by_place(x)
        products = tl.zeros((BLOCK_N, BLOCK_Q, 4), tl.float32)
        for place in tl.static_range(0, 8, 2):
            pair = packed << (15 - 4 * place) if place < 4 else packed >> (4 * place - 15)  # places at bits 15 and 19
            products += counted(pair, 15, magic) * (16 * x[place].to(tl.float32))[None, :, :]
            products += counted(pair, 19, magic) * x[place + 1].to(tl.float32)[None, :, :]
        dot = tl.sum(products, axis=2) - surplus[None, :]
        acc += scale.to(tl.float32) * (dot - zero.to(tl.float32) * total[None, :])
    out = tl.sum(acc, axis=1)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def pair_at(words, place: tl.constexpr, magic, dtype: tl.constexpr):
    """words [..] int32 -> [.., 2]: bias + nibble `place` of the lower and of the upper half, in dtype and exact.

    Both halves of magic are the bits of the bias, from which on the 16-bit dtype counts in ones; 0 in float32.
    """
    bits = words >> 4 * place & 0x000F000F | magic
    halves = tl.join(bits & 0xFFFF, bits >> 16)
    if dtype == tl.float32:
        return halves.to(dtype)
    else:
        return halves.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def four_places(words, magic, dtype: tl.constexpr):
    """words [..] -> [.., 2 halves, 2, 2]: nibble a + 2 b of a half stands at [.., b, a]."""
    even = tl.join(pair_at(words, 0, magic, dtype), pair_at(words, 2, magic, dtype))
    odd = tl.join(pair_at(words, 1, magic, dtype), pair_at(words, 3, magic, dtype))
    return tl.join(even, odd)


@triton.jit
def unpack_tile(packed, magic, dtype: tl.constexpr):
    """packed [BLOCK_N, QUADS, 4] int32 -> bias + code in dtype, [8 places, QUADS, 4 words, BLOCK_N], axes of two split.

    Neighbouring words first swap halves: the pairs that come out of an int32 then are neighbouring columns, as tensor
    cores take them. `tl.join` makes a new last axis, `permute` renames axes: no thread needs another's codes.
    """
    one, two = tl.split(packed.reshape(packed.shape[0], packed.shape[1], 2, 2))
    lower, upper = one & 0xFFFF | two << 16, one >> 16 & 0xFFFF | two >> 16 << 16
    codes = tl.join(four_places(lower, magic, dtype), four_places(upper, magic, dtype))
    return codes.permute(6, 4, 5, 1, 2, 3, 0)


@triton.jit
def matmul_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, M, N, quads, groups, magic, BIAS: tl.constexpr, FEW: tl.constexpr,
    GROUP_QUADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program: a tile of x @ W.T, or the part of it that its share of K gives. BIAS, magic: as in `pair_at`.

    FEW rows: their sums are scaled, not the weights, and K is taken by place, quad, word, in which order a thread of
    the tensor cores unpacks for itself. Scale and zero, too narrow for asynchronous copies, are loaded a step ahead.
    """
    left, top = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1).to(tl.int64) * BLOCK_M
    split, splits, steps = tl.program_id(2), tl.num_programs(2), quads // BLOCK_Q
    first, end = split * steps // splits, (split + 1) * steps // splits
    row, column, quad, word = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_Q), tl.arange(0, 4)
    row_live, column_live = row < M - top, column < N - left
    x_ptr += top * quads * QUAD + row[:, None] * (quads * QUAD) + tl.arange(0, BLOCK_Q * QUAD)[None, :]
    packed_ptr += left * quads * 4 + (column[:, None] * quads + quad[None, :])[:, :, None] * 4 + word[None, None, :]
    group = left * groups + column * groups
    next_scale = tl.load(scale_ptr + group + first * BLOCK_Q // GROUP_QUADS, mask=column_live, other=0.0)
    next_zero = tl.load(zero_ptr + group + first * BLOCK_Q // GROUP_QUADS, mask=column_live, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, end):
        x = tl.load(x_ptr + step * BLOCK_Q * QUAD, mask=row_live[:, None], other=0.0)
        packed = tl.load(packed_ptr + step * BLOCK_Q * 4, mask=column_live[:, None, None], other=0)
        scale, surplus = next_scale.to(tl.float32)[None, :], BIAS + next_zero.to(tl.float32)[None, :]
        following = tl.minimum(step + 1, end - 1) * BLOCK_Q // GROUP_QUADS
        next_scale = tl.load(scale_ptr + group + following, mask=column_live, other=0.0)
        next_zero = tl.load(zero_ptr + group + following, mask=column_live, other=0)
        codes = unpack_tile(packed, magic, x.dtype)
        if FEW:
            ones = tl.full((BLOCK_Q * QUAD, BLOCK_N), 1, x.dtype)
            total = tl.dot(x, ones, input_precision="ieee", out_dtype=tl.float32)  # the sum of x, in every column
            x = x.reshape(BLOCK_M, BLOCK_Q, 8, 4).permute(0, 2, 1, 3).reshape(BLOCK_M, BLOCK_Q * QUAD)
            dot = tl.dot(x, codes.reshape(BLOCK_Q * QUAD, BLOCK_N), input_precision="ieee", out_dtype=tl.float32)
            acc += scale * (dot - surplus * total)
        else:
            codes = codes.permute(3, 0, 1, 2, 4, 5, 6).reshape(BLOCK_Q * QUAD, BLOCK_N)  # K by quad, place, word
            weight = (codes.to(tl.float32) - surplus) * scale
            acc = tl.dot(x, weight.to(x.dtype), acc, input_precision="ieee")
    out_ptr += (split.to(tl.int64) * M + top) * N + left
    live = row_live[:, None] & column_live[None, :]
    tl.store(out_ptr + (row[:, None] * N + column[None, :]), acc.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def combine_kernel(partial_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = the SPLITS rows of partial [SPLITS, size], added in their order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + index, mask=index < size, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + index, acc.to(out_ptr.dtype.element_ty), mask=index < size)


def configuration(M: int, N: int, K: int, group_size: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Tiles, split of K, warps and pipeline stages for one shape: `block_k` is in columns and, for M > 1, divides g."""
    if M == 1:
        return {"block_m": 1, "block_n": 8, "block_k": 4096, "splits": 1, "warps": 4, "stages": 1}
    if dtype is torch.float32:  # no tensor cores: tiles that fit the registers
        return {"block_m": 16, "block_n": 32, "block_k": 32, "splits": 1, "warps": 4, "stages": 2}
    block_m = min(128, max(16, 1 << (M - 1).bit_length()))
    block_k = math.gcd(group_size, 128 if M <= 16 else 64)
    tiles, splits = triton.cdiv(M, block_m) * triton.cdiv(N, 128), 1
    while tiles * splits < 128 and splits < 16 and 4 * block_k * splits <= K:  # at least two steps each
        splits *= 2
    return {"block_m": block_m, "block_n": 128, "block_k": block_k, "splits": splits, "warps": 8, "stages": 4}


def weight_only_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, **blocks: int
) -> Tensor:
    """x `[M, K]` times the transpose of the weights `[N, K]` that packed, scale and zero stand for: `[M, N]`.

    x       float16, bfloat16 or float32 (IEEE products, slow: for tests), contiguous
    packed  int32 `[N, K / 8]` in the layout above, contiguous
    scale   float16, bfloat16 or float32 `[N, K / group_size]`, contiguous
    zero    uint8 of the same shape, contiguous
    blocks  parts of `configuration` to replace: block_m, block_n, block_k, splits, powers of two

    Sums are float32; for M > 16 weights are rounded to x's dtype before the product. The result has x's dtype.
    Raises ValueError or TypeError for anything else.
    """
    M, N, K = _checked(x, packed, scale, zero, group_size)
    chosen = configuration(M, N, K, group_size, x.dtype) | blocks
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    sizes = (K // QUAD.value, K // group_size)
    meta = {
        "GROUP_QUADS": group_size // QUAD.value,
        "BLOCK_N": chosen["block_n"],
        "BLOCK_Q": min(chosen["block_k"], triton.next_power_of_2(K)) // QUAD.value,
        "num_warps": chosen["warps"],
        "num_stages": chosen["stages"],
    }
    if M == 1:
        matvec_kernel[(triton.cdiv(N, chosen["block_n"]),)](x, packed, scale, zero, out, N, *sizes, 0x41800000, **meta)
        return out
    require(group_size % chosen["block_k"] == 0, f"block_k={chosen['block_k']} must divide group_size={group_size}")
    splits = chosen["splits"]
    target = out if splits == 1 else torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(N, chosen["block_n"]), triton.cdiv(M, chosen["block_m"]), splits)
    meta |= {"BLOCK_M": chosen["block_m"], "BIAS": BIASES[x.dtype][0], "FEW": M <= 16}
    matmul_kernel[grid](x, packed, scale, zero, target, M, N, *sizes, BIASES[x.dtype][1], **meta)
    if splits > 1:
        combine_kernel[(triton.cdiv(M * N, 1024),)](target, out, M * N, SPLITS=splits, BLOCK=1024)
    return out


def _checked(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> tuple[int, int, int]:
    """(M, N, K), or the error that `weight_only_matmul` promises."""
    require(x.dim() == 2 and packed.dim() == 2, f"x and packed must be matrices, got {x.dim()} and {packed.dim()} axes")
    (M, K), N = x.shape, packed.shape[0]
    require(min(M, N, K) > 0, f"x and packed must not be empty, got {tuple(x.shape)} and {tuple(packed.shape)}")
    require(packed.shape[1] * 8 == K, f"packed must be [N, K / 8] with K={K}, got {tuple(packed.shape)}")
    require(
        group_size > 0 and group_size % QUAD.value == 0 and K % group_size == 0,
        f"group_size must be a multiple of 32 that divides K={K}, got {group_size}",
    )
    for name, grid in {"scale": scale, "zero": zero}.items():
        shape = (N, K // group_size)
        require(tuple(grid.shape) == shape, f"{name} must be [N, K / group_size] = {shape}, got {tuple(grid.shape)}")
    require_dtype(tuple(BIASES), x=x, scale=scale)
    require_dtype((torch.int32,), packed=packed)
    require_dtype((torch.uint8,), zero=zero)
    require_contiguous(x=x, packed=packed, scale=scale, zero=zero)
    require_launchable(x=x, packed=packed, scale=scale, zero=zero)
    return M, N, K


def unpack(packed: Tensor) -> Tensor:
    """packed `[N, K / 8]` -> codes `[N, K]` uint8 by plain torch operators."""
    places = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)[:, None]
    return (packed.unflatten(1, (-1, 1, 4)) >> places & 15).to(torch.uint8).flatten(1)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weights `[N, K]` in dtype by plain torch operators, rounded as in `matmul_kernel`."""
    codes = unpack(packed).unflatten(1, (-1, group_size))
    return ((codes - zero.float()[..., None]) * scale.float()[..., None]).flatten(1).to(dtype)


def arguments(M: int, N: int, K: int, group_size: int, device: torch.device) -> tuple:
    """Those of `weight_only_matmul`, with contents on a GPU only."""
    packed = torch.empty((N, K // 8), dtype=torch.int32, device=device)
    scale = torch.empty((N, K // group_size), dtype=torch.bfloat16, device=device)
    zero = torch.empty(scale.shape, dtype=torch.uint8, device=device)
    x = torch.empty((M, K), dtype=torch.bfloat16, device=device)
    if device.type == "cuda":
        x.normal_()
        packed.random_(-(2**31), 2**31)
        scale.uniform_(0.005, 0.015)
        zero.random_(0, 16)
    return x, packed, scale, zero, group_size


def dense_arguments(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The same weights as cuBLAS wants them: (x, W), both in x's dtype."""
    return x, dequantize(packed, scale, zero, group_size, x.dtype)


def int4_arguments(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> tuple:
    """As `torch._weight_int4pack_mm` wants them: x, its tiles, g, and (scale, (8 - zero) * scale) `[K / g, N, 2]`."""
    codes = unpack(packed)
    tiles = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    grids = torch.stack([scale, (8 - zero.to(scale.dtype)) * scale], dim=-1).transpose(0, 1).contiguous()
    return x, tiles, group_size, grids


def llama_case(M: int, N: int, K: int, group_size: int = 128) -> Case:
    """A linear layer of a Llama model in groups of 128, bfloat16 activations."""
    return Case(
        name=f"{M} x {K} to {N}, W4 g{group_size}",
        inputs=lambda device: arguments(M, N, K, group_size, device),
        run=weight_only_matmul,
        expected=lambda *a: F.linear(*dense_arguments(*a)),
        bytes=N * K // 2 + 3 * N * K // group_size + 2 * M * (K + N),
        operations=2 * M * N * K,
        kind="stream" if M <= 16 else "matrix",
        peers={"cuBLAS bf16": F.linear, "torch int4pack": torch._weight_int4pack_mm},
        prepare={"cuBLAS bf16": dense_arguments, "torch int4pack": int4_arguments},
    )


CASES = [llama_case(M, N, 4096) for N in (4096, 11008) for M in (1, 16, 512)] + [llama_case(1, 28672, 8192)]
