"""LLM.int8 product: int8 by int8 where numbers are ordinary, 16 bits by int8 where a column holds an outlier.

Fused: taking the outlier columns out, quantizing the rest of x, both products and their scales. A tile of x and a tile
of codes are loaded once; the tensor cores multiply them in int8, and only where the tile has an outlier column, once
more in the precision of x, from registers. Neither the codes of x, nor the outlier columns or their weights, nor an
int32 result ever lie in memory.

    bytes        4 M K  +  N K  +  4 (M + N)  +  2 M N        x is read twice: once to know its maxima, once to multiply
    operations   2 M N K in int8, 2 M N block_k in 16 bits for each block_k columns that hold an outlier
Replaces, in separate operators: maxima 2 M K, quantizing 3 M K, gathering k outlier columns 4 M k and their weights
3 N k, an int8 product M K + N K + 4 M N, scaling it 6 M N, and adding the outliers' product, 2 (M + N) k + 4 M N.
Without the small terms in k, 6 M K + N K + 14 M N: for 2048 rows in a 4096 x 4096 layer 185 MB, here 67.

`statistics_kernel`   one program per row of x: the largest number below the threshold, and a mark on every column, and
                      on every tile of columns, in which the row holds an outlier. Programs write the same 1 or nothing,
                      so that their order does not matter. What is not finite is an outlier at any threshold.
`matmul_kernel`       a tile of x Wᵀ. Quantizing costs two instructions per number: x · 127 / maximum + 1.5 · 2^23 is a
                      float32 whose lowest 8 bits are the code, rounded half to even. Multiplied and added separately
                      (no fused multiply-add, which rounds once, where the reference rounds twice).

x and the marks of tiles are loaded a step ahead into registers, because the asynchronous copies that bring the codes
would bring x in the order of the tensor cores, and each warp would quantize the same numbers again. Two sums, int32 and
float32, take the registers of a tile twice as large. Up to 64 rows the weights are what takes the time: narrow tiles,
so that many programs stream them. int32 holds the sums of 131,072 columns.

With `exact`, weights of outlier columns come from a 16-bit matrix (the paper), not from the int8 codes (the library):
2 N k bytes more, or 32 N k where outlier columns are far apart, because memory is read in sectors of 16 numbers.

Layout: codes `[N, K]` int8, K-major (as `nn.Linear` has it), so that both operands are copied 16 bytes at a time.
Method: Dettmers et al. 2022, arXiv 2208.07339.
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

LEAST = tl.constexpr(2.0**-119)  # 127 / a smaller maximum is too large for float32
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: from here on float32 counts in ones
MOST = 2**17  # columns: a sum of so many products of two int8 fits int32
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def statistics_kernel(x_ptr, maxima_ptr, columns_ptr, tiles_ptr, K, threshold, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a row of x. Its largest magnitude below threshold, and a 1 where a column or tile has an outlier."""
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        size = tl.abs(tl.load(x_ptr + row * K + column, mask=column < K, other=0.0).to(tl.float32))
        regular = size < threshold  # false for NaN
        acc = tl.maximum(acc, tl.where(regular, size, 0.0))
        one, outlier = tl.full((BLOCK,), 1, tl.int8), (column < K) & ~regular
        tl.store(columns_ptr + column, one, mask=outlier)
        tl.store(tiles_ptr + column // TILE, one, mask=outlier)
    largest = tl.max(acc, axis=0)
    tl.store(maxima_ptr + row, tl.where(largest < LEAST, 0.0, largest))


@triton.jit
def matmul_kernel(
    x_ptr, maxima_ptr, columns_ptr, tiles_ptr, codes_ptr, absmax_ptr, exact_ptr, out_ptr, M, N, K,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of x Wᵀ. EXACT: outlier columns meet the weights of exact_ptr, not the codes."""
    left, top = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1).to(tl.int64) * BLOCK_M
    row, column, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_live, column_live = row < M - top, column < N - left
    x_ptr += top * K + row[:, None] * K + inner[None, :]
    weight = left * K + column[:, None] * K + inner[None, :]
    maxima = tl.load(maxima_ptr + top + row, mask=row_live, other=0.0)
    inverse = tl.div_rn(127.0, tl.where(maxima > 0, maxima, float("inf")))[:, None]
    next_x = tl.load(x_ptr, mask=row_live[:, None] & (inner < K)[None, :], other=0.0)
    next_tile = tl.load(tiles_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    high = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x, tile, live, following = next_x, next_tile, inner < K - start, start + BLOCK_K
        next_x = tl.load(x_ptr + following, mask=row_live[:, None] & (inner < K - following)[None, :], other=0.0)
        next_tile = tl.load(tiles_ptr + following // BLOCK_K, mask=following < K, other=0)
        codes = tl.load(codes_ptr + weight + start, mask=column_live[:, None] & live[None, :], other=0)
        marked = (tl.load(columns_ptr + start + inner, mask=live, other=0) != 0)[None, :]
        regular = tl.where(marked, 0.0, x.to(tl.float32))
        rounded = (regular * inverse + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
        acc = tl.dot(rounded, codes.T, acc, out_dtype=tl.int32)
        if tile != 0:
            outliers = tl.where(marked, x, 0.0).to(x.dtype)
            if EXACT:
                wanted = column_live[:, None] & marked
                precise = tl.load(exact_ptr + weight + start, mask=wanted, other=0.0).to(x.dtype)
            else:
                precise = codes.to(x.dtype)
            high = tl.dot(outliers, precise.T, high, input_precision="ieee")
    absmax = tl.load(absmax_ptr + left + column, mask=column_live, other=0.0)[None, :]
    out = acc.to(tl.float32) * (maxima[:, None] * absmax) * (1 / 16129)
    out += high if EXACT else high * (absmax * (1 / 127))
    out_ptr += top * N + left
    live = row_live[:, None] & column_live[None, :]
    tl.store(out_ptr + (row[:, None] * N + column[None, :]), out.to(out_ptr.dtype.element_ty), mask=live)


def configuration(M: int, dtype: torch.dtype = torch.float16) -> dict[str, int]:
    """Tiles, warps and pipeline stages for M rows."""
    if dtype is torch.float32:  # no tensor cores for the outliers: tiles that fit the registers
        return {"block_m": 16, "block_n": 32, "block_k": 32, "warps": 4, "stages": 2}
    if M <= 16:
        return {"block_m": 16, "block_n": 32, "block_k": 256, "warps": 4, "stages": 5}
    if M <= 64:
        return {"block_m": 64, "block_n": 32, "block_k": 64, "warps": 4, "stages": 6}
    return {"block_m": 64, "block_n": 128, "block_k": 64, "warps": 8, "stages": 4}


def outlier_statistics(
    x: Tensor, threshold: float = 6.0, block_k: int = 64, block: int = 4096
) -> tuple[Tensor, Tensor, Tensor]:
    """What `multiply` must know of x `[M, K]`: (maxima, columns, tiles).

    maxima     float32 `[M]`: the largest magnitude below threshold, in all columns; under 2^-119 it counts as 0
    columns    int8 `[K]`: 1 if any row holds a magnitude of threshold or more, or what is not finite
    tiles      int8 `[K / block_k, rounded up]`: 1 for every block_k columns of which one is marked
    threshold  0 stands for infinity
    block_k    and block, what a program loads at a time, are powers of two

    x as for `llm_int8_matmul`, and so are the errors.
    """
    _check_x(x, threshold)
    require_launchable(x=x)
    M, K = x.shape
    maxima = torch.empty(M, dtype=torch.float32, device=x.device)
    columns = torch.zeros(K, dtype=torch.int8, device=x.device)
    tiles = torch.zeros(triton.cdiv(K, block_k), dtype=torch.int8, device=x.device)
    limit = float(threshold) or math.inf
    size = min(triton.next_power_of_2(K), block)
    statistics_kernel[(M,)](x, maxima, columns, tiles, K, limit, TILE=block_k, BLOCK=size, num_warps=8)
    return maxima, columns, tiles


def multiply(
    x: Tensor, statistics: tuple[Tensor, Tensor, Tensor], codes: Tensor, absmax: Tensor, exact: Tensor | None,
    chosen: dict[str, int],
) -> Tensor:  # fmt: skip
    """The product, given the `outlier_statistics` of x for this block_k; chosen as `configuration` makes it."""
    (M, K), N = x.shape, len(codes)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(N, chosen["block_n"]), triton.cdiv(M, chosen["block_m"]))
    matmul_kernel[grid](
        x, *statistics, codes, absmax, codes if exact is None else exact, out, M, N, K,
        EXACT=exact is not None, BLOCK_M=chosen["block_m"], BLOCK_N=chosen["block_n"], BLOCK_K=chosen["block_k"],
        num_warps=chosen["warps"], num_stages=chosen["stages"], enable_fp_fusion=False,
    )  # fmt: skip
    return out


def llm_int8_matmul(
    x: Tensor, codes: Tensor, absmax: Tensor, threshold: float = 6.0, exact: Tensor | None = None, **blocks: int
) -> Tensor:
    """x `[M, K]` times the transpose of the weights codes * absmax / 127: `[M, N]` in x's dtype.

    x          float16, bfloat16 or float32 (slow: for tests), contiguous
    codes      int8 `[N, K]`, contiguous; absmax float32 `[N]`, contiguous
    threshold  magnitudes from which on a number makes its column an outlier column; 0: none
    exact      None, or the weights `[N, K]` before rounding, in x's dtype, contiguous: they serve outlier columns
    blocks     parts of `configuration` to replace: block_m, block_n, block_k, powers of two

    Raises ValueError or TypeError for anything else.
    """
    _checked(x, codes, absmax, threshold, exact)
    chosen = configuration(len(x), x.dtype) | blocks
    return multiply(x, outlier_statistics(x, threshold, chosen["block_k"]), codes, absmax, exact, chosen)


def _check_x(x: Tensor, threshold: float) -> None:
    """The errors of `llm_int8_matmul` that concern x and threshold."""
    require(x.dim() == 2 and x.numel() > 0, f"x must be a non-empty [M, K] matrix, got {tuple(x.shape)}")
    require(x.shape[1] <= MOST, f"x must have at most {MOST} columns, got {x.shape[1]}")
    require(threshold >= 0, f"threshold must be 0 or more, got {threshold}")
    require_dtype(FLOATS, x=x)
    require_contiguous(x=x)


def _checked(x: Tensor, codes: Tensor, absmax: Tensor, threshold: float, exact: Tensor | None) -> None:
    """The errors that `llm_int8_matmul` promises."""
    _check_x(x, threshold)
    K = x.shape[1]
    require(
        codes.dim() == 2 and codes.shape[1] == K and len(codes) > 0,
        f"codes must be [N, K] with K={K}, got {tuple(codes.shape)}",
    )
    require(absmax.shape == codes.shape[:1], f"absmax must be [N] = [{len(codes)}], got {tuple(absmax.shape)}")
    require_dtype((torch.int8,), codes=codes)
    require_dtype((torch.float32,), absmax=absmax)
    held = {"x": x, "codes": codes, "absmax": absmax}
    if exact is not None:
        require(exact.shape == codes.shape, f"exact must be {tuple(codes.shape)} as codes, got {tuple(exact.shape)}")
        require_dtype((x.dtype,), exact=exact)
        held["exact"] = exact
    require_contiguous(**held)
    require_launchable(**held)


def arguments(M: int, N: int, K: int, outliers: int, exact: bool, device: torch.device) -> tuple:
    """Those of `llm_int8_matmul`, with contents on a GPU only: `outliers` columns of x are far above the threshold."""
    x = torch.empty((M, K), dtype=torch.float16, device=device)
    codes = torch.empty((N, K), dtype=torch.int8, device=device)
    absmax = torch.empty(N, dtype=torch.float32, device=device)
    weight = torch.empty((N, K), dtype=torch.float16, device=device) if exact else None
    if device.type == "cuda":
        x.normal_().clamp_(-5, 5)
        x[:, torch.linspace(0, K - 1, outliers).long()] *= 20
        codes.random_(-127, 128)
        absmax.uniform_(0.05, 0.15)
        if weight is not None:
            weight.copy_(codes * absmax[:, None] / 127)
    return x, codes, absmax, 6.0, weight


def by_operators(x: Tensor, codes: Tensor, absmax: Tensor, threshold: float, exact: Tensor | None) -> Tensor:
    """The same by plain torch operators, one after another, as the library has it."""
    regular = x.abs() < (threshold or math.inf)
    marked = ~regular.all(dim=0)
    maxima = torch.where(regular, x, 0).abs().amax(dim=1, keepdim=True).float()
    rounded = torch.round(torch.where(marked, 0, x) * (127 / maxima)).nan_to_num(0).to(torch.int8)
    padded = F.pad(rounded, (0, 0, 0, max(17 - len(x), 0)))  # `_int_mm` wants more than 16 rows
    out = torch._int_mm(padded, codes.T)[: len(x)] * (maxima * absmax) / 16129
    weight = exact[:, marked] if exact is not None else (codes[:, marked] * absmax[:, None] / 127).to(x.dtype)
    return out.to(x.dtype).addmm(x[:, marked], weight.T)


def dense_arguments(x: Tensor, codes: Tensor, absmax: Tensor, threshold: float, exact: Tensor | None) -> tuple:
    """The same weights as cuBLAS wants them: (x, W), both in x's dtype."""
    return x, (codes * absmax[:, None] / 127).to(x.dtype)


def llama_case(M: int, N: int, K: int, outliers: int = 7, exact: bool = False) -> Case:
    """A linear layer of a Llama model whose input has as many outlier columns as the paper finds in 6.7B: at most 7."""
    tiles = outliers * configuration(M)["block_k"]
    return Case(
        name=f"{M} x {K} to {N}, {outliers} outlier columns{', exact' if exact else ''}",
        inputs=lambda device: arguments(M, N, K, outliers, exact, device),
        run=llm_int8_matmul,
        expected=by_operators,
        bytes=4 * M * K + N * K + 4 * (M + N) + 2 * M * N + (2 * N * outliers if exact else 0),
        operations=2 * M * N * (K + 2 * tiles),  # 16 bits: half the rate
        kind="stream" if M <= 16 else "matrix",
        rate="int8",
        peers={"separate operators": by_operators, "cuBLAS fp16": F.linear},
        prepare={"cuBLAS fp16": dense_arguments},
    )


CASES = [llama_case(M, N, 4096) for N in (4096, 11008) for M in (1, 16, 64, 512)]
CASES += [llama_case(512, 4096, 4096, 0), llama_case(2048, 4096, 11008)]
