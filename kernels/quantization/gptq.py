"""GPTQ's column solver: a block of columns of W stays on chip while one column after another is rounded.

Fused: for each of the B columns of a block, rounding, the error over U_jj, and the update of the columns to its right.
A program holds a tile of rows in registers, since rows share U and nothing else; a column that is done leaves its error
in its place, so that the tile ends as the error matrix, which one matrix product then spreads over the later blocks.

    bytes        4 N B + 4 B² + 8 N  read  +  N B + 4 N B  written     W, U, grids; codes, errors; float32
    operations   N B²                                                  2 for each pair of a column and a later one
Replaces the loop over columns by torch operators, which reads and writes the rest of the block for each of them: about
4 N B² bytes, B / 2 times the floor, in some 10 launches a column. U's row is read from the L1 cache by every program.

Neither bytes nor operations bound it, but the chain of B dependent steps: pick a column out of the tile (a masked sum
in a warp), divide, round, divide, update. So tiles are few rows high and many run side by side, and each row of the
tile loads U's row for itself: handed from thread to thread, it would take two barriers a column.

Rounding: x + m − m with m = 1.5 · 2^23 (float64: 2^52) leaves the nearest integer, ties to even, for small x; both
divisions are IEEE. The compiler may fuse a product and a sum, so on a GPU a weight that lies within rounding of the
middle between two codes may take the other one. Grids, order and Cholesky factor are left to torch.
Method: Frantar et al. 2022, arXiv 2210.17323, algorithm 1; the conventions are those of chapters/quantization/gptq.py.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_dtype, require_launchable

MAGIC = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}
WIDEST = 256  # columns of a block


@triton.jit
def quotient(a, b):
    """a / b, correctly rounded."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def solve_kernel(
    weight_ptr, upper_ptr, scale_ptr, zero_ptr, group_ptr, codes_ptr, errors_ptr, N, weight_stride, upper_stride,
    groups, width, last, MAGIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of a block of `width` columns; last: the largest code.

    weight [N, width] and upper [width, width] with the given strides; scale, zero [N, groups]; group [width] names the
    grid of each column; codes (uint8) and errors [N, width] are contiguous.
    """
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    live = (row < N)[:, None] & (column < width)[None, :]
    across = tl.broadcast_to(column[None, :], (BLOCK_N, BLOCK_C))  # U's row, laid out like the tile
    # Right of column j the tile holds W, repaired so far; left of it errors.
    tile = tl.load(weight_ptr + row[:, None] * weight_stride + column[None, :], mask=live, other=0.0)
    codes = tl.zeros((BLOCK_N, BLOCK_C), tl.uint8)
    for j in range(width):
        later = tl.load(upper_ptr + j * upper_stride + across, mask=across < width, other=0.0)
        later = tl.where((column > j)[None, :], later, 0.0)
        pivot = tl.load(upper_ptr + j * upper_stride + j)
        grid = row * groups + tl.load(group_ptr + j)
        scale = tl.load(scale_ptr + grid, mask=row < N, other=1.0)
        zero = tl.load(zero_ptr + grid, mask=row < N, other=0.0)
        here = (column == j)[None, :]
        value = tl.sum(tl.where(here, tile, 0.0), axis=1)
        steps = tl.minimum(tl.maximum(quotient(value, scale), -512.0), 512.0)  # a code is at most 255
        code = tl.minimum(tl.maximum(steps + MAGIC - MAGIC + zero, 0.0), last)
        error = quotient(value - scale * (code - zero), pivot + tl.zeros_like(value))
        tile = tl.where(here, error[:, None], tile - error[:, None] * later)
        codes = tl.where(here, code.to(tl.uint8)[:, None], codes)
    place = row[:, None] * width + column[None, :]
    tl.store(codes_ptr + place, codes, mask=live)
    tl.store(errors_ptr + place, tile, mask=live)


def solve_block(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int, block_n: int = 8
) -> tuple[Tensor, Tensor]:
    """Round a block of B columns, each error spread over those to its right: codes uint8 and errors, both `[N, B]`.

    weight, upper   `[N, B]`, `[B, B]` upper triangular; neighbouring columns are neighbours in memory; B is 1 .. 256
    scale, zero     `[N, groups]` contiguous; zero holds integers
    group           `[B]` int32 contiguous: the group of each column
    block_n         rows of a program, a power of two

    The first four are all float32 or all float64. An error is (w − q) / U_jj, as the later blocks want it. Weight is
    not modified. Raises ValueError or TypeError for anything else.
    """
    require(weight.dim() == 2 and weight.numel() > 0, f"weight must be a matrix, not empty, got {tuple(weight.shape)}")
    (N, width), groups = weight.shape, scale.shape[-1]
    require(width <= WIDEST, f"weight must have at most {WIDEST} columns, got {width}")
    for name, part, shape in (
        ("upper", upper, (width, width)), ("scale", scale, (N, groups)), ("zero", zero, (N, groups)),
        ("group", group, (width,)),
    ):  # fmt: skip
        require(tuple(part.shape) == shape, f"{name} must have shape {shape}, got {tuple(part.shape)}")
    for name, part in {"weight": weight, "upper": upper, "scale": scale, "zero": zero, "group": group}.items():
        require(part.stride(-1) == 1 or part.shape[-1] == 1, f"{name} must have neighbouring columns side by side")
    require(scale.is_contiguous() and zero.is_contiguous(), "scale and zero must be contiguous")
    require(bits in range(1, 9), f"bits must be an integer from 1 to 8, got {bits}")
    require_dtype(tuple(MAGIC), weight=weight)
    require_dtype((weight.dtype,), upper=upper, scale=scale, zero=zero)
    require_dtype((torch.int32,), group=group)
    require_launchable(weight=weight, upper=upper, scale=scale, zero=zero, group=group)
    codes = torch.empty((N, width), dtype=torch.uint8, device=weight.device)
    errors = torch.empty((N, width), dtype=weight.dtype, device=weight.device)
    solve_kernel[(triton.cdiv(N, block_n),)](
        weight, upper, scale, zero, group, codes, errors, N, weight.stride(0), upper.stride(0), groups, width,
        2**bits - 1, MAGIC=MAGIC[weight.dtype], BLOCK_N=block_n, BLOCK_C=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return codes, errors


def find_grid(weight: Tensor, bits: int, symmetric: bool, mse: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the last axis of weight `[..., n]`, without it; as the function of that name in the chapter."""
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = torch.where(low < 0, -high, low)
    empty = high == low
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    scale, zero = _grid_between(low, high, bits, symmetric)
    least = torch.full_like(scale, torch.inf)
    for percent in range(80 if mse else 0):
        steps, offsets = _grid_between((1 - percent / 100) * low, (1 - percent / 100) * high, bits, symmetric)
        codes = (torch.round(weight / steps[..., None]) + offsets[..., None]).clamp(0, 2**bits - 1)
        error = ((steps[..., None] * (codes - offsets[..., None]) - weight).abs() ** 2.4).sum(-1)
        better = error < least
        least, scale, zero = (torch.where(better, *p) for p in ((error, least), (steps, scale), (offsets, zero)))
    return scale, zero


def _grid_between(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid with 2**bits values from low to high."""
    scale = (high - low) / torch.full_like(high, 2**bits - 1)  # a tensor: by a number CUDA does not divide exactly
    divides = bool(((scale > 0) & scale.isfinite()).all())
    require(divides, f"weight has a range that {scale.dtype} cannot divide into {2**bits - 1} steps")
    return scale, torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with UᵀU = (H + damping · mean(diag H) · I)⁻¹; ValueError unless that is positive definite."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)
    lower, failed = torch.linalg.cholesky_ex(damped)
    sound = not failed and bool((lower.diagonal() ** 2 >= 1e-12 * damped.diagonal()).all())
    require(sound, f"hessian is not positive definite with damping={damping}; raise it, use more text")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).contiguous()


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    mse: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes uint8 `[out, in]`, scale, zero `[out, groups]`, group_of_column int64 `[in]`), on weight's device.

    Arguments as in the chapter, weight and hessian as tensors, block_size up to 256. A float64 weight is solved in
    float64, any other in float32; the hessian is factored in float64. Neither is modified. ValueError as there.
    """
    rest, hessian, size = _checked(weight, hessian, bits, group_size, damping, block_size)
    dead, columns = hessian.diagonal() == 0, torch.arange(rest.shape[1], device=rest.device)
    hessian.diagonal()[dead] = 1
    seen, rest = rest, rest.masked_fill(dead, 0)
    scale, zero = find_grid((seen if group_size is None else rest).unflatten(1, (-1, size)), bits, symmetric, mse)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else columns
    group = (order if static_groups else columns) // size
    upper = inverse_factor(hessian[order][:, order], damping).to(rest.dtype)
    rest, codes = rest[:, order], torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    for start in range(0, len(columns), block_size):
        block = slice(start, min(start + block_size, len(columns)))
        if group_size is not None and not static_groups:
            for first in range(-(-start // size) * size, block.stop, size):  # groups that begin in this block
                fitted = find_grid(rest[:, first : first + size], bits, symmetric, mse)
                scale[:, first // size], zero[:, first // size] = fitted
        parts = rest[:, block], upper[block, block], scale, zero, group[block].int()
        codes[:, block], errors = solve_block(*parts, bits)
        rest[:, block.stop :] -= errors @ upper[block, block.stop :]
    back = torch.argsort(order)
    return codes[:, back], scale, zero, group[back]


def _checked(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int | None, damping: float, block_size: int
) -> tuple[Tensor, Tensor, int]:
    """What `checked_layer` returns, and the columns of a group; or the error."""
    weight, hessian = checked_layer(weight, hessian, damping, block_size)
    require(bits in range(1, 9) and bits is not True, f"bits must be an integer from 1 to 8, got {bits!r}")
    columns = weight.shape[1]
    size = columns if group_size is None else group_size
    require(size > 0 and columns % size == 0, f"group_size must divide the {columns} columns of weight, got {size}")
    return weight, hessian, size


def checked_layer(weight: Tensor, hessian: Tensor, damping: float, block_size: int) -> tuple[Tensor, Tensor]:
    """Copies of weight, float32 or float64, and of hessian, float64.

    Raises ValueError for what is empty, not finite, ill shaped, not symmetric or out of range, TypeError for a dtype.
    """
    require(weight.dim() == 2 and weight.numel() > 0, f"weight must be a matrix, not empty, got {tuple(weight.shape)}")
    require_launchable(weight=weight, hessian=hessian)
    columns, wide = weight.shape[1], torch.promote_types(weight.dtype, torch.float32)
    require_dtype(tuple(MAGIC), **{"weight, in at least 32 bits,": weight.to(wide)})
    limit = 1e100 if wide is torch.float64 else 1e30  # spread errors must still fit
    require(bool((weight.abs() < limit).all()), f"weight must be finite and below {limit}")
    ranges = 0 <= damping < torch.inf and 1 <= block_size <= WIDEST
    require(ranges, f"need damping >= 0, block_size 1 .. {WIDEST}, got damping={damping}, block_size={block_size}")
    fits = tuple(hessian.shape) == (columns, columns) and bool(hessian.isfinite().all())
    require(fits, f"hessian must be finite, [in, in] = {(columns, columns)}; got shape {tuple(hessian.shape)}")
    hessian = hessian.to(torch.float64, copy=True)
    require(bool((hessian - hessian.T).abs().max() <= 1e-4 * hessian.abs().max()), "hessian must be symmetric")
    return weight.detach().to(wide, copy=True), hessian


def column_by_column(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """`solve_block` by plain torch operators, some ten launches a column."""
    rest, codes, errors = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8).to(weight.device), weight.clone()
    for j, g in enumerate(group.tolist()):
        code = (torch.round(rest[:, j] / scale[:, g]) + zero[:, g]).clamp(0, 2**bits - 1)
        errors[:, j] = (rest[:, j] - scale[:, g] * (code - zero[:, g])) / upper[j, j]
        rest[:, j:] -= torch.outer(errors[:, j], upper[j, j:])
        codes[:, j] = code
    return codes, errors


def arguments(N: int, K: int, width: int, device: torch.device) -> tuple:
    """Those of `solve_block`: the first block of a weight `[N, K]`, one grid per row, 4 bits."""
    weight = torch.randn((N, K), device=device)[:, :width]
    upper = (torch.eye(width) + 0.02 * torch.randn(width, width).triu(1)).to(device)
    scale, zero = torch.full((N, 1), 0.4, device=device), torch.full((N, 1), 8.0, device=device)
    return weight, upper, scale, zero, torch.zeros(width, dtype=torch.int32, device=device), 4


def llama_case(N: int, K: int, width: int = 128) -> Case:
    """A block of 128 columns of a Llama layer. The errors are compared: a weight in between may take either code."""
    return Case(
        name=f"{width} columns of {N} x {K}, 4 bits",
        inputs=lambda device: arguments(N, K, width, device),
        run=lambda *a: solve_block(*a)[1],
        expected=lambda *a: column_by_column(*a)[1],
        bytes=9 * N * width + 4 * width**2 + 8 * N,
        operations=N * width**2,
        kind="stream",
        peers={"torch, column by column": lambda *a: column_by_column(*a)[1]},
    )


CASES = [llama_case(4096, 4096), llama_case(11008, 4096), llama_case(28672, 8192)]
