"""Weight-only product x @ Wᵀ with W in 4, 3 or 2 bits: the kernel of GPTQ and of all that ends in codes and grids.

Fused: unpacking, scale * (code - zero), and the product. The weights cross the memory bus once, as packed codes.
Decoding reads every weight for each token and does two operations with it, so it gains what bytes are saved.

    bytes        bits N K / 8  +  3 N K / g  +  2 M (K + N)    codes, 16-bit scales and 8-bit zeros, activations
    operations   2 M N K                                       floor: the larger of bytes / bandwidth, operations / rate
Replaces x @ dequantize(W).T, which moves (4 + bits / 8) N K bytes if W is unpacked for the call, 2 N K if it is kept.

One row of x        `matvec_kernel`: no tensor cores, every program takes the whole K of a few rows of W. K is split
                    between its threads, whose sums meet on chip: no partial sum goes to memory.
2 to 16 rows        `matmul_kernel`, tiles padded to 16 rows, K split between programs until 128 of them are at work;
                    each writes its partial sum in float32 and `combine_kernel` adds them. No atomics: same bits always.
more                the same, one program per output tile where there are 128 tiles.

At so few operations per byte, instructions are the other limit. A code therefore becomes a float by one AND-OR into the
bits of a bias, and up to 16 rows the scale, the zero and that bias are applied to sums, not to weights:
    sum of scale * (code - zero) * x  =  scale * (sum of (bias + code) * x  -  (bias + zero) * sum of x)

Layout: packed `[N, K bits / 32]` int32, K-major, in quads: four words, 16 bytes, one 128-bit load. Columns are taken in
runs of 32: nibble i (0 is the lowest) of word w belongs to column 4 i + w of a run. One shift of the four words thus
gives four neighbouring columns, and four neighbouring activations.
    4 bits   a quad holds a run.
    2 bits   a quad holds two runs, 64 columns: the first in the lower halves of the nibbles, the second in the upper.
    3 bits   three quads hold four runs, 128 columns: as with 2 bits the two low bits of runs 0 and 1, those of runs 2
             and 3, then the top bits, bit r of a nibble being run r's. A row of W is all its first quads, then all
             second, then all third ones: neighbouring threads load neighbouring quads.
A shift and a mask, with 3 bits twice, make the nibbles of a run; what follows is the same for all. scale, zero
`[N, K / g]`; g is a multiple of 32 and divides K, which is a multiple of 32, 64 (2 bits) or 128 (3 bits). Method:
split-K and unpacking on chip as in Hoque et al. 2024, arXiv 2402.00025.
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

RUN = tl.constexpr(32)  # columns that one shift of four words serves, four at a time
RUNS = {2: 2, 3: 4, 4: 1}  # bits: runs in a span, the columns of one quad, or with 3 bits of three
# The bias of `pair_at`, from which on the 16-bit dtype counts in ones, and its bits twice.
BIASES = {torch.float16: (1024, 0x64006400), torch.bfloat16: (128, 0x43004300), torch.float32: (0, 0)}


@triton.jit
def counted(packed, bit: tl.constexpr, magic):
    """The code that begins at bit 19 of each int32 as 16 + code, or that at bit 15 as 16 + code / 16: float32, exact.

    A float from 16 to 32 counts in ones from its bit 19 up: OR-ed into the bits of 16.0, a code is added to it. These
    are magic, and no constant: mask and magic as two constants would not fit one AND-OR instruction.
    """
    return (packed & (15 << bit) | magic).to(tl.float32, bitcast=True)


@triton.jit
def load_quads(packed_ptr, plane, live, BITS: tl.constexpr):
    """The quads of the spans that packed_ptr [.., 4] points at: with 3 bits three, `plane` words apart, else one."""
    quad = tl.load(packed_ptr, mask=live, other=0)
    if BITS == 3:
        second = tl.load(packed_ptr + plane, mask=live, other=0)
        return quad, second, tl.load(packed_ptr + 2 * plane, mask=live, other=0)
    else:
        return quad, quad, quad


@triton.jit
def nibbles(quads, run: tl.constexpr, BITS: tl.constexpr):
    """The words of a run with a nibble for each code, from the quads of its span."""
    if BITS == 4:
        return quads[0]
    words = quads[run // 2] >> 2 * (run % 2) & 0x33333333
    if BITS == 3:
        words |= (quads[2] >> run & 0x11111111) << 2
    return words


@triton.jit
def by_place(x):
    """x [BLOCK_S, 32] -> eight [BLOCK_S, 4]: what meets nibble 0 of the four words, nibble 1, .., moved on chip."""
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
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, N, spans, groups, magic, BITS: tl.constexpr, RUNS: tl.constexpr,
    GROUP_RUNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of W times the vector x, BLOCK_S spans of columns at a time; magic: bits of 16.0."""
    PLANES: tl.constexpr = RUNS * BITS // 4
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row64 = row.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    for start in range(0, spans, BLOCK_S):
        span = start + tl.arange(0, BLOCK_S)
        live = (row < N)[:, None] & (span < spans)[None, :]
        address = (row64 * PLANES * spans + span[None, :])[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        quads = load_quads(packed_ptr + address, spans * 4, live[:, :, None], BITS)  # [BLOCK_N, BLOCK_S, 4]
        for run in tl.static_range(RUNS):
            at = span * RUNS + run
            group = row64 * groups + (at // GROUP_RUNS)[None, :]
            scale = tl.load(scale_ptr + group, mask=live, other=0.0)
            zero = tl.load(zero_ptr + group, mask=live, other=0)
            column = at[:, None] * RUN + tl.arange(0, RUN)[None, :]
            x = tl.load(x_ptr + column, mask=(span < spans)[:, None], other=0.0)
            total = tl.sum(x.to(tl.float32), axis=1)
            # What 16.0 adds to the products: 16 x at bit 19; at bit 15, where x is taken 16 times, 256 x.
            surplus = tl.sum(x.to(tl.float32) * tl.where(column // 4 % 2 == 0, 256.0, 16.0), axis=1)
            x, words = by_place(x), nibbles(quads, run, BITS)
            products = tl.zeros((BLOCK_N, BLOCK_S, 4), tl.float32)
            for place in tl.static_range(0, 8, 2):  # places at bits 15 and 19
                pair = words << (15 - 4 * place) if place < 4 else words >> (4 * place - 15)
                products += counted(pair, 15, magic) * (16 * x[place].to(tl.float32))[None, :, :]
                products += counted(pair, 19, magic) * x[place + 1].to(tl.float32)[None, :, :]
            dot = tl.sum(products, axis=2) - surplus[None, :]
            acc += scale.to(tl.float32) * (dot - zero.to(tl.float32) * total[None, :])
    out = tl.sum(acc, axis=1)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def pair_at(words, place: tl.constexpr, magic, dtype: tl.constexpr):
    """words [..] int32 -> [.., 2]: bias + nibble `place` of both halves, lower first; magic: the bias's bits, twice."""
    bits = words >> 4 * place & 0x000F000F | magic
    halves = tl.join(bits & 0xFFFF, bits >> 16)
    return halves.to(dtype) if dtype == tl.float32 else halves.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def four_places(words, magic, dtype: tl.constexpr):
    """words [..] -> [.., 2 halves, 2, 2]: nibble a + 2 b of a half stands at [.., b, a]."""
    even = tl.join(pair_at(words, 0, magic, dtype), pair_at(words, 2, magic, dtype))
    odd = tl.join(pair_at(words, 1, magic, dtype), pair_at(words, 3, magic, dtype))
    return tl.join(even, odd)


@triton.jit
def unpack_tile(words, magic, dtype: tl.constexpr):
    """words [BLOCK_N, BLOCK_S, 4] int32 -> bias + code in dtype, [8 places, BLOCK_S, 4, BLOCK_N], axes of two split.

    Neighbouring words first swap halves: the pairs that come out of an int32 then are neighbouring columns, as tensor
    cores take them. `tl.join` makes a new last axis, `permute` renames axes: no thread needs another's codes.
    """
    one, two = tl.split(words.reshape(words.shape[0], words.shape[1], 2, 2))
    lower, upper = one & 0xFFFF | two << 16, one >> 16 & 0xFFFF | two >> 16 << 16
    codes = tl.join(four_places(lower, magic, dtype), four_places(upper, magic, dtype))
    return codes.permute(6, 4, 5, 1, 2, 3, 0)


@triton.jit
def matmul_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, M, N, spans, groups, magic, BIAS: tl.constexpr, FEW: tl.constexpr,
    BITS: tl.constexpr, RUNS: tl.constexpr, GROUP_RUNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: a tile of x @ W.T, or the part of it that its share of K gives. BIAS, magic: as in `pair_at`.

    A step takes BLOCK_S spans, run by run. Scale and zero, too narrow for asynchronous copies, are loaded a run ahead.
    FEW rows: their sums are scaled, not the weights, and a run is taken by place, span, word: the order in which a
    thread of the tensor cores unpacks for itself.
    """
    STEP: tl.constexpr = BLOCK_S * RUNS  # runs
    left, top = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1).to(tl.int64) * BLOCK_M
    split, splits, steps = tl.program_id(2), tl.num_programs(2), spans // BLOCK_S
    first, end = split * steps // splits, (split + 1) * steps // splits
    row, column, span, word = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S), tl.arange(0, 4)
    row_live, column_live, k = row < M - top, column < N - left, tl.arange(0, BLOCK_S * RUN)
    x_ptr += (top + row[:, None]) * (spans * RUNS * RUN) + (k // RUN * (RUNS * RUN) + k % RUN)[None, :]
    line = (left + column) * (spans * (RUNS * BITS // 4))
    packed_ptr += (line[:, None] + span[None, :])[:, :, None] * 4 + word[None, None, :]
    group = (left + column) * groups
    next_scale = tl.load(scale_ptr + group + first * STEP // GROUP_RUNS, mask=column_live, other=0.0)
    next_zero = tl.load(zero_ptr + group + first * STEP // GROUP_RUNS, mask=column_live, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, end):
        quads = load_quads(packed_ptr + step * BLOCK_S * 4, spans * 4, column_live[:, None, None], BITS)
        for run in tl.static_range(RUNS):
            x = tl.load(x_ptr + (step * STEP + run) * RUN, mask=row_live[:, None], other=0.0)
            scale, surplus = next_scale.to(tl.float32)[None, :], BIAS + next_zero.to(tl.float32)[None, :]
            following = step * STEP + run + 1 if run + 1 < RUNS else tl.minimum(step + 1, end - 1) * STEP
            next_scale = tl.load(scale_ptr + group + following // GROUP_RUNS, mask=column_live, other=0.0)
            next_zero = tl.load(zero_ptr + group + following // GROUP_RUNS, mask=column_live, other=0)
            codes = unpack_tile(nibbles(quads, run, BITS), magic, x.dtype)
            if FEW:
                ones = tl.full((BLOCK_S * RUN, BLOCK_N), 1, x.dtype)
                total = tl.dot(x, ones, input_precision="ieee", out_dtype=tl.float32)  # the sum of x, in every column
                x = x.reshape(BLOCK_M, BLOCK_S, 8, 4).permute(0, 2, 1, 3).reshape(BLOCK_M, BLOCK_S * RUN)
                dot = tl.dot(x, codes.reshape(BLOCK_S * RUN, BLOCK_N), input_precision="ieee", out_dtype=tl.float32)
                acc += scale * (dot - surplus * total)
            else:
                codes = codes.permute(3, 0, 1, 2, 4, 5, 6).reshape(BLOCK_S * RUN, BLOCK_N)  # by span, place, word
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


def configuration(M: int, N: int, K: int, group_size: int, dtype=torch.bfloat16, bits: int = 4) -> dict[str, int]:
    """Tiles, split of K, warps, stages. `block_k`, in columns, is made of spans; if M > 1 it divides g or is one."""
    span = RUN.value * RUNS[bits]
    if M == 1:
        return {"block_m": 1, "block_n": 8, "block_k": 4096, "splits": 1, "warps": 4, "stages": 1}
    if dtype is torch.float32:  # no tensor cores: tiles that fit the registers
        return {"block_m": 16, "block_n": 32, "block_k": span, "splits": 1, "warps": 4, "stages": 2}
    block_m = min(128, max(16, 1 << (M - 1).bit_length()))
    block_k = max(span, math.gcd(group_size, 128 if M <= 16 else 64))
    warps, stages = (4, 3) if block_k == span and M <= 16 else (8, 4)  # 128 rows are 128 loads of a quad
    tiles, splits = triton.cdiv(M, block_m) * triton.cdiv(N, 128), 1
    while tiles * splits < 128 and splits < 16 and 4 * block_k * splits <= K:  # at least two steps each
        splits *= 2
    return {"block_m": block_m, "block_n": 128, "block_k": block_k, "splits": splits, "warps": warps, "stages": stages}


def weight_only_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int = 4, **blocks: int
) -> Tensor:
    """x `[M, K]` times the transpose of the weights `[N, K]` that packed, scale and zero stand for: `[M, N]`.

    x       float16, bfloat16 or float32 (IEEE products, slow: for tests), contiguous
    packed  int32 `[N, K bits / 32]` in the layout above, contiguous; bits 2, 3 or 4
    scale   float16, bfloat16 or float32 `[N, K / group_size]`, contiguous
    zero    uint8 of the same shape, contiguous
    blocks  parts of `configuration` to replace: block_m, block_n, block_k, splits, powers of two

    Sums are float32; for M > 16 weights are rounded to x's dtype before the product. The result has x's dtype.
    Raises ValueError or TypeError for anything else.
    """
    M, N, K = _checked(x, packed, scale, zero, group_size, bits)
    chosen = configuration(M, N, K, group_size, x.dtype, bits) | blocks
    out, span = torch.empty((M, N), dtype=x.dtype, device=x.device), RUN.value * RUNS[bits]
    sizes, block_k = (K // span, K // group_size), max(span, min(chosen["block_k"], triton.next_power_of_2(K)))
    meta = {"BITS": bits, "RUNS": RUNS[bits], "GROUP_RUNS": group_size // RUN.value, "BLOCK_N": chosen["block_n"]}
    meta |= {"BLOCK_S": block_k // span, "num_warps": chosen["warps"], "num_stages": chosen["stages"]}
    if M == 1:
        matvec_kernel[(triton.cdiv(N, chosen["block_n"]),)](x, packed, scale, zero, out, N, *sizes, 0x41800000, **meta)
        return out
    require(block_k == span or group_size % block_k == 0, f"block_k={block_k} must divide group_size={group_size}")
    splits = chosen["splits"]
    target = out if splits == 1 else torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(N, chosen["block_n"]), triton.cdiv(M, chosen["block_m"]), splits)
    meta |= {"BLOCK_M": chosen["block_m"], "BIAS": BIASES[x.dtype][0], "FEW": M <= 16}
    matmul_kernel[grid](x, packed, scale, zero, target, M, N, *sizes, BIASES[x.dtype][1], **meta)
    if splits > 1:
        combine_kernel[(triton.cdiv(M * N, 1024),)](target, out, M * N, SPLITS=splits, BLOCK=1024)
    return out


def _checked(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int) -> tuple[int, ...]:
    """(M, N, K), or the error that `weight_only_matmul` promises."""
    require(bits in RUNS, f"bits must be 2, 3 or 4, got {bits}")
    require(x.dim() == 2 and packed.dim() == 2, f"x and packed must be matrices, got {x.dim()} and {packed.dim()} axes")
    (M, K), N, span = x.shape, packed.shape[0], RUN.value * RUNS[bits]
    require(min(M, N, K) > 0, f"x and packed must not be empty, got {tuple(x.shape)} and {tuple(packed.shape)}")
    require(K % span == 0, f"K must be a multiple of {span} for {bits} bits, got {K}")
    whole = packed.shape[1] * 32 == K * bits
    require(whole, f"packed must be [N, K bits / 32] with K={K}, bits={bits}, got {tuple(packed.shape)}")
    divides = group_size > 0 and group_size % RUN.value == 0 and K % group_size == 0
    require(divides, f"group_size must be a multiple of 32 that divides K={K}, got {group_size}")
    for name, grid in {"scale": scale, "zero": zero}.items():
        shape = (N, K // group_size)
        require(tuple(grid.shape) == shape, f"{name} must be [N, K / group_size] = {shape}, got {tuple(grid.shape)}")
    require_dtype(tuple(BIASES), x=x, scale=scale)
    require_dtype((torch.int32,), packed=packed)
    require_dtype((torch.uint8,), zero=zero)
    require_contiguous(x=x, packed=packed, scale=scale, zero=zero)
    require_launchable(x=x, packed=packed, scale=scale, zero=zero)
    return M, N, K


def unpack(packed: Tensor, bits: int = 4) -> Tensor:
    """packed `[N, K bits / 32]` -> codes `[N, K]` uint8 by plain torch operators."""
    quads = packed.unflatten(1, (RUNS[bits] * bits // 4, -1, 4)).unbind(1)  # each [N, spans, 4]
    words = list(quads) if bits == 4 else [quad >> half & 0x33333333 for quad in quads[:2] for half in (0, 2)]
    if bits == 3:
        words = [low | (quads[2] >> run & 0x11111111) << 2 for run, low in enumerate(words)]
    places = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)[:, None]
    return (torch.stack(words, dim=2)[..., None, :] >> places & 15).to(torch.uint8).flatten(1)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype, bits=4) -> Tensor:
    """The weights `[N, K]` in dtype by plain torch operators, rounded as in `matmul_kernel`."""
    codes = unpack(packed, bits).unflatten(1, (-1, group_size))
    return ((codes - zero.float()[..., None]) * scale.float()[..., None]).flatten(1).to(dtype)


def arguments(M: int, N: int, K: int, group_size: int, bits: int, device: torch.device) -> tuple:
    """Those of `weight_only_matmul`."""
    x = torch.randn((M, K), dtype=torch.bfloat16, device=device)
    packed = torch.randint(-(2**31), 2**31, (N, K * bits // 32), dtype=torch.int32, device=device)
    scale = torch.empty((N, K // group_size), dtype=torch.bfloat16, device=device).uniform_(0.005, 0.015)
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, device=device)
    return x, packed, scale, zero, group_size, bits


def dense_arguments(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int = 4) -> tuple:
    """The same weights as cuBLAS wants them: (x, W), both in x's dtype."""
    return x, dequantize(packed, scale, zero, group_size, x.dtype, bits)


def int4_arguments(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int = 4) -> tuple:
    """As `torch._weight_int4pack_mm` wants them: x, its tiles, g, and (scale, (8 - zero) * scale) `[K / g, N, 2]`."""
    codes = unpack(packed, bits)
    tiles = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    grids = torch.stack([scale, (8 - zero.to(scale.dtype)) * scale], dim=-1).transpose(0, 1).contiguous()
    return x, tiles, group_size, grids


def llama_case(M: int, N: int, K: int, bits: int = 4, group_size: int = 128) -> Case:
    """A linear layer of a Llama model in groups of 128, bfloat16 activations; torch has a peer in 4 bits only."""
    return Case(
        name=f"{M} x {K} to {N}, W{bits} g{group_size}",
        inputs=lambda device: arguments(M, N, K, group_size, bits, device),
        run=weight_only_matmul,
        expected=lambda *a: F.linear(*dense_arguments(*a)),
        bytes=N * K * bits // 8 + 3 * N * K // group_size + 2 * M * (K + N),
        operations=2 * M * N * K,
        kind="stream" if M <= 16 else "matrix",
        peers={"cuBLAS bf16": F.linear} | ({"torch int4pack": torch._weight_int4pack_mm} if bits == 4 else {}),
        prepare={"cuBLAS bf16": dense_arguments} | ({"torch int4pack": int4_arguments} if bits == 4 else {}),
    )


CASES = [llama_case(M, N, 4096) for N in (4096, 11008) for M in (1, 16, 512)] + [llama_case(1, 28672, 8192)]
CASES += [llama_case(M, 4096, 4096, bits) for bits in (3, 2) for M in (1, 16, 512)]
