"""W8A8 product in Triton: int8 x int8 -> int32 on tensor cores, each sum times its token's and its channel's scale.

    out[m, n] = (sum over k of x[m, k] * weight[n, k]) * x_scale[m] * weight_scale[n]

Fused: both scales and the conversion to the output's dtype. An int32 sum never goes to memory.

    bytes        M K  +  N K  +  s M N  +  4 (M + N)        codes in, scales in, results of s bytes out
    operations   2 M N K                                    floor: the larger of bytes / bandwidth, operations / rate
Replaces torch._int_mm and two multiplications, which write 4 M N bytes of int32, read them again, and so on: at least
4 + 4 + s more bytes for each result, and _int_mm alone needs more than 16 rows. A product of 16-bit weights moves
2 N K + 2 M K and multiplies at half the rate.

A tile of BLOCK_M x BLOCK_N results reads (BLOCK_M + BLOCK_N) K bytes: 128 x 256 tiles read each byte of x N / 256
times, of weight M / 128 times. So that these come from the L2 cache, neighbouring programs take GROUP tiles that lie
below each other before they move right: the about 132 that run at once read 16 x 128 rows of x and 8 or 9 x 256 of
weight, nearly the least for their number.

Loads run several steps ahead of the tensor cores, into shared memory: on sm_90 and sm_100 the TMA unit copies whole
tiles (one thread asks, edges are filled with zeros), elsewhere each thread copies 16 bytes at a time asynchronously.
On sm_90 wgmma takes both operands from there and keeps the sums in registers. Triton 3.7 has no such product of int8
for sm_100, which multiplies by mma.sync, as sm_80 does.

Up to 64 rows the weights are what takes the time. Tiles are then narrow, so that 4096 channels make 128 programs, and
deep in K, so that each has 40 KB or more on its way.

Layout: x [M, K] and weight [N, K] int8, both K-major. Stored [K, N] as cuBLAS calls row-major, a weight tile would have
to be transposed on its way, for int8 tensor-core operands must be K-major. M, N and K may be anything.
Method: Xiao et al. 2022, arXiv 2211.10438, section 4, which takes CUTLASS kernels for this. Peer: torch._int_mm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.shared.tiles import has_warpgroup_products

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LONGEST = 2**31 // 128**2  # columns of which the sum of products, each at most 128 * 128, must stay below


@triton.jit
def tile_place(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: down GROUP row tiles, then a column to the right; then the next GROUP."""
    first = program // (GROUP * column_tiles) * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    return first + within % rows, within // rows


@triton.jit
def matmul_kernel(
    x, weight, x_scale, weight_scale, out, M, N, K, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BULK: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out [M, N]. BULK: x and weight are tensor descriptors, which know their edges; else pointers.

    PER_TOKEN, PER_CHANNEL: 1 where there is a scale for each row of x, or of weight, and 0 where one serves all. A
    descriptor loads the tile that begins at [row, k]. Sums are exact int32, which `tl.dot` must be told as out_dtype;
    each is converted to float32, scaled there, and rounded to the dtype of out.
    """
    row_tile, column_tile = tile_place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    top, left = row_tile * BLOCK_M, column_tile * BLOCK_N
    row, column, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_live, column_live = row < M - top, column < N - left
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if BULK:
            x_tile, weight_tile = x.load([top, start]), weight.load([left, start])
        else:
            live = (k < K - start)[None, :]
            x_from, weight_from = x + top.to(tl.int64) * K + start, weight + left.to(tl.int64) * K + start
            x_tile = tl.load(x_from + (row[:, None] * K + k[None, :]), mask=row_live[:, None] & live, other=0)
            offsets = column[:, None] * K + k[None, :]
            weight_tile = tl.load(weight_from + offsets, mask=column_live[:, None] & live, other=0)
        acc = tl.dot(x_tile, weight_tile.T, acc, out_dtype=tl.int32)
    row_scale = tl.load(x_scale + (top + row) * PER_TOKEN, mask=row_live, other=0.0)
    column_scale = tl.load(weight_scale + (left + column) * PER_CHANNEL, mask=column_live, other=0.0)
    scaled = acc.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    out += top.to(tl.int64) * N + left
    live = row_live[:, None] & column_live[None, :]
    tl.store(out + (row[:, None] * N + column[None, :]), scaled.to(out.dtype.element_ty), mask=live)


def configuration(M: int, N: int, K: int) -> dict[str, int]:
    """Tile, warps and pipeline stages for one shape and GPU; `group`: row tiles that neighbouring programs share."""
    wide = has_warpgroup_products()
    if M <= 64:
        block_m = max(16, 1 << (M - 1).bit_length())
        tile = (block_m, 32, 256, 4, 5 if block_m == 16 else 4)
    else:
        tiles = [(128, 256, 128, 8, 4), (128, 128, 128, 8, 4), (64, 128, 128, 4, 4)] if wide else [(128, 128, 64, 8, 4)]
        tiles.append((64, 64, 128, 4, 4))
        filling = (tile for tile in tiles if triton.cdiv(M, tile[0]) * triton.cdiv(N, tile[1]) >= 120)
        tile = next(filling, tiles[-1])
    return dict(zip(("block_m", "block_n", "block_k", "warps", "stages"), tile, strict=True)) | {"group": 16}


def w8a8_matmul(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype = torch.bfloat16,
    bulk: bool | None = None, **blocks: int,
) -> Tensor:  # fmt: skip
    """Codes x `[M, K]` times the transpose of codes weight `[N, K]`, scaled: `[M, N]` in `dtype`.

    x, weight              int8, contiguous, all 256 codes; K at most 131071, so that no int32 sum can overflow
    x_scale, weight_scale  float32, `[M]` or `[1]` and `[N]` or `[1]`, contiguous
    dtype                  of the result: float16, bfloat16 or float32
    bulk                   load by tensor descriptors (needs K divisible by 16 and 16-byte alignment); None: where the
                           GPU has the unit, the operands allow it, and there are more than 64 rows
    blocks                 parts of `configuration` to replace: block_m, block_n, block_k, warps, stages, group

    Sums are exact; each is then converted to float32, scaled there, and rounded to dtype.
    Raises ValueError or TypeError for anything else.
    """
    M, N, K = _checked(x, weight, x_scale, weight_scale, dtype)
    chosen = configuration(M, N, K) | blocks
    out = torch.empty((M, N), dtype=dtype, device=x.device)
    describable = K % 16 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    if bulk is None:
        bulk = describable and M > 64 and has_warpgroup_products()
    require(describable or not bulk, f"bulk loads need 16-byte alignment and K={K} divisible by 16")
    block_m, block_n, block_k = chosen["block_m"], chosen["block_n"], chosen["block_k"]
    codes: tuple[Any, Any] = (x, weight)
    if bulk:
        sizes = ([block_m, block_k], [block_n, block_k])
        codes = tuple(map(TensorDescriptor.from_tensor, codes, sizes))
    grid = (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)
    matmul_kernel[grid](
        *codes, x_scale, weight_scale, out, M, N, K, int(len(x_scale) > 1), int(len(weight_scale) > 1), bulk,
        chosen["group"], block_m, block_n, block_k, num_warps=chosen["warps"], num_stages=chosen["stages"],
    )  # fmt: skip
    return out


def _checked(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> tuple:
    """(M, N, K), or the error that `w8a8_matmul` promises."""
    require(x.dim() == 2 and weight.dim() == 2, f"x and weight must be matrices, got {x.dim()} and {weight.dim()} axes")
    (M, K), N = x.shape, len(weight)
    require(min(M, N, K) > 0, f"x and weight must not be empty, got {tuple(x.shape)} and {tuple(weight.shape)}")
    require(weight.shape[1] == K, f"weight must be [N, K] with K={K}, got {tuple(weight.shape)}")
    require(K < LONGEST, f"K must be below {LONGEST}, for sums to fit int32, got {K}")
    for name, scale, size in (("x_scale", x_scale, M), ("weight_scale", weight_scale, N)):
        require(tuple(scale.shape) in ((1,), (size,)), f"{name} must be [{size}] or [1], got {tuple(scale.shape)}")
    require_dtype((torch.int8,), x=x, weight=weight)
    require_dtype((torch.float32,), x_scale=x_scale, weight_scale=weight_scale)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be {' or '.join(map(str, DTYPES))}, got {dtype}")
    require_contiguous(x=x, weight=weight, x_scale=x_scale, weight_scale=weight_scale)
    require_launchable(x=x, weight=weight, x_scale=x_scale, weight_scale=weight_scale)
    return M, N, K


def arguments(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """Those of `w8a8_matmul`, with contents on a GPU only."""
    x, weight = (torch.empty((rows, K), dtype=torch.int8, device=device) for rows in (M, N))
    x_scale, weight_scale = (torch.empty(rows, device=device) for rows in (M, N))
    if device.type == "cuda":
        for codes, scale in ((x, x_scale), (weight, weight_scale)):
            codes.random_(-127, 128)
            scale.uniform_(0.005, 0.015)
    return x, weight, x_scale, weight_scale, dtype


def scaled_int_mm(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by torch's int8 product, which takes more than 16 rows, and multiplications after it."""
    return (torch._int_mm(x, weight.T) * x_scale[:, None] * weight_scale).to(dtype)


def dense(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in float32, whose sums of int8 products are nearly exact."""
    return (F.linear(x.float(), weight.float()) * x_scale[:, None] * weight_scale).to(dtype)


def dense_arguments(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, _: torch.dtype) -> tuple:
    """The dequantized operands, as a product in bfloat16 takes them."""
    return (x * x_scale[:, None]).bfloat16(), (weight * weight_scale[:, None]).bfloat16()


def llama_case(M: int, N: int, K: int) -> Case:
    """A linear layer of a Llama model, scales per token and per channel, bfloat16 results."""
    peers = {"cuBLAS bf16": F.linear} | ({"torch._int_mm, scaled": scaled_int_mm} if M > 16 else {})
    return Case(
        name=f"{M} x {K} to {N}",
        inputs=lambda device: arguments(M, N, K, torch.bfloat16, device),
        run=w8a8_matmul,
        expected=dense,
        bytes=M * K + N * K + 2 * M * N + 4 * (M + N),
        operations=2 * M * N * K,
        kind="matrix",
        rate="int8",
        peers=peers,
        prepare={"cuBLAS bf16": dense_arguments},
    )


def bare_case(M: int, N: int, K: int) -> Case:
    """All scales 1 and results of 4 bytes: what torch._int_mm computes, and the goal is 95% of its speed at least.

    The peer's int32 is compared as it is: sums of so many random codes stay far below 2^24 and are the same floats.
    """

    def inputs(device: torch.device) -> tuple:
        x, weight, *_ = arguments(M, N, K, torch.float32, device)
        return x, weight, torch.ones(1, device=device), torch.ones(1, device=device), torch.float32

    return Case(
        name=f"{M} x {K} to {N}, scales of 1, float32",
        inputs=inputs,
        run=w8a8_matmul,
        expected=dense,
        bytes=M * K + N * K + 4 * M * N + 8,
        operations=2 * M * N * K,
        kind="matrix",
        rate="int8",
        peers={"torch._int_mm": lambda x, weight, *_: torch._int_mm(x, weight.T)},
    )


CASES = [
    *(llama_case(M, 4096, 4096) for M in (1, 16, 64, 512, 4096)),
    llama_case(4096, 11008, 4096),
    llama_case(4096, 4096, 11008),
    bare_case(4096, 11008, 4096),
]
