"""SparseGPT's column solver: a block of columns of W stays on chip while one column after another is dropped or kept.

Fused: the choice of n of every m neighbours, rounding to a grid if asked for, the error over U_jj, and the update of
the columns to the right. A program holds a tile of rows in registers, since rows share U and nothing else. Where any
weight may go the mask is given: its threshold is found over all rows, which no program sees. The errors leave the
kernel, too: one matrix product spreads them over the later blocks.

    bytes        4 N B + 4 B²  read  +  8 N B  written  +  N B      W, U; Ŵ, E; the mask, read or, if chosen, written;
                                                                    float32; 8 N more for grids
    operations   N B²                                               2 for each pair of a column and a later one
Replaces the loop over columns by torch operators, which reads and writes the rest of the block for each of them: about
4 N B² bytes, B / 3 times the floor, in some 5 launches a column, and more for the choice. U's row is read from the L1
cache by every program.

Neither bytes nor operations bound it, but the chain of B dependent steps: pick a column out of the tile (two masked
sums in a warp, side by side), divide, update. So tiles are few rows high and many run side by side, and each row of the
tile loads U's row for itself, 128 bits at a time: handed from thread to thread, it would take two barriers a column (by
the code for sm_90; not timed). The choice takes one more such sum for each column: its score is picked out and compared
with the whole tile, and what is beaten by fewer than n of its group stays. That needs no sort and serves any m.

It orders by |w| / U_jj, the root of the reference's score, which does not overflow. The compiler may fuse a product and
a sum, so on a GPU two scores within rounding of each other may change places. Thresholds and the Cholesky factor are
left to torch.
Method: Frantar and Alistarh 2023, arXiv 2301.00774; the conventions are those of chapters/pruning/sparsegpt.py.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.quantization.gptq import MAGIC, WIDEST, checked_layer, find_grid, inverse_factor, quotient

Grid = tuple[Tensor, Tensor, int]  # scale, zero, bits


@triton.jit
def group_keeps(score, column, start, n, m):
    """Where fewer than n of the columns start .. start + m − 1 have a higher score, or an equal one and come first.

    score [R, C], column [C] its columns' numbers; int1 [R, C], of use within the group.
    """
    beaten = tl.zeros(score.shape, tl.int32)
    for other in range(start, start + m):
        rival = tl.sum(tl.where((column == other)[None, :], score, 0.0), axis=1)[:, None]
        beaten += ((rival > score) | ((rival == score) & (column > other)[None, :])).to(tl.int32)
    return beaten < n


@triton.jit
def solve_kernel(
    weight_ptr, upper_ptr, mask_ptr, scale_ptr, zero_ptr, solved_ptr, errors_ptr, N, weight_stride, upper_stride,
    width, n, m, last, CHOOSE: tl.constexpr, ROUND: tl.constexpr, MAGIC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of a block of `width` columns, in groups of m (m = width where the mask is given).

    weight [N, width] and upper [width, width] with the given strides; mask (uint8: written with CHOOSE, else read),
    solved and errors [N, width] are contiguous; scale, zero [N] are read with ROUND, `last` is the largest code.
    """
    first, row, column = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    live = (first + row < N)[:, None] & (column < width)[None, :]
    place = first * width + (row[:, None] * width + column[None, :])
    across = tl.broadcast_to(column[None, :], (BLOCK_N, BLOCK_C))  # U's row, laid out like the tile
    # Right of column j the tile holds W, repaired so far; left of it errors.
    tile = tl.load(weight_ptr + (first + row)[:, None] * weight_stride + column[None, :], mask=live, other=0.0)
    solved = tl.zeros_like(tile)
    keep = tl.zeros((BLOCK_N, BLOCK_C), tl.int1)
    diagonal = tl.load(upper_ptr + column * (upper_stride + 1), mask=column < width, other=1.0)
    if not CHOOSE:
        keep = tl.load(mask_ptr + place, mask=live, other=0) != 0
    if ROUND:
        scale = tl.load(scale_ptr + first + row, mask=first + row < N, other=1.0)
        zero = tl.load(zero_ptr + first + row, mask=first + row < N, other=0.0)
    for start in range(0, width, m):
        if CHOOSE:
            chosen = group_keeps(tl.abs(tile) / diagonal[None, :], column, start, n, m)
            keep = tl.where(((column >= start) & (column < start + m))[None, :], chosen, keep)
        for j in range(start, start + m):
            later = tl.load(upper_ptr + j * upper_stride + across, mask=across < width, other=0.0)
            later = tl.where((column > j)[None, :], later, 0.0)
            pivot = tl.load(upper_ptr + j * upper_stride + j)
            here = (column == j)[None, :]
            value = tl.sum(tl.where(here, tile, 0.0), axis=1)
            result = tl.sum(tl.where(here & keep, tile, 0.0), axis=1)
            if ROUND:
                steps = tl.minimum(tl.maximum(quotient(result, scale), -512.0), 512.0)  # a code is at most 255
                result = scale * (tl.minimum(tl.maximum(steps + MAGIC - MAGIC + zero, 0.0), last) - zero)
            error = quotient(value - result, pivot + tl.zeros_like(value))
            tile = tl.where(here, error[:, None], tile - error[:, None] * later)
            solved = tl.where(here, result[:, None], solved)
    tl.store(solved_ptr + place, solved, mask=live)
    tl.store(errors_ptr + place, tile, mask=live)
    if CHOOSE:
        tl.store(mask_ptr + place, keep.to(tl.uint8), mask=live)


def solve_block(
    weight: Tensor, upper: Tensor, mask: Tensor | None = None, pattern: tuple[int, int] | None = None,
    grid: Grid | None = None, block_n: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Solve a block of B columns, left to right: solved, errors and mask, each `[N, B]`, contiguous.

    weight, upper   `[N, B]`, `[B, B]` upper triangular; neighbouring columns are neighbours in memory; B is 1 .. 256
    mask            bool `[N, B]` contiguous, True where a weight is kept, or
    pattern         (n, m): the n highest |w| / U_jj of every m neighbours stay, of equal ones the first; m divides B
    grid            (scale, zero, bits), the first two `[N]` contiguous, bits 1 .. 8: what stays is rounded to it
    block_n         rows of a program, a power of two

    All but mask are float32, or all float64. An error is (w − ŵ) / U_jj, as the later blocks want it. Nothing is
    modified. Raises ValueError or TypeError for anything else.
    """
    check_operands(weight, upper, mask, pattern, grid)
    N, width = weight.shape
    solved, errors = (torch.empty((N, width), dtype=weight.dtype, device=weight.device) for _ in range(2))
    chosen = torch.empty((N, width), dtype=torch.bool, device=weight.device) if mask is None else mask
    n, m = pattern or (width, width)
    scale, zero, bits = grid or (weight, weight, 0)  # without a grid nothing reads them
    solve_kernel[(triton.cdiv(N, block_n),)](
        weight, upper, chosen.view(torch.uint8), scale, zero, solved, errors, N, weight.stride(0), upper.stride(0),
        width, n, m, 2**bits - 1, CHOOSE=mask is None, ROUND=grid is not None, MAGIC=MAGIC[weight.dtype],
        BLOCK_N=block_n, BLOCK_C=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return solved, errors, chosen


def check_operands(
    weight: Tensor, upper: Tensor, mask: Tensor | None, pattern: tuple[int, int] | None, grid: Grid | None
) -> None:
    """Refuse what `solve_block` cannot launch, naming the operand at fault."""
    require(weight.dim() == 2 and weight.numel() > 0, f"weight must be a matrix, not empty, got {tuple(weight.shape)}")
    N, width = weight.shape
    require(width <= WIDEST, f"weight must have at most {WIDEST} columns, got {width}")
    require((mask is None) != (pattern is None), "give either mask or pattern")
    require_groups(width, pattern)
    require_dtype(tuple(MAGIC), weight=weight)
    held: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {"upper": (upper, (width, width), weight.dtype)}
    if mask is not None:
        held["mask"] = mask, (N, width), torch.bool
    if grid is not None:
        require(grid[2] in range(1, 9), f"bits must be an integer from 1 to 8, got {grid[2]}")
        held |= {"scale": (grid[0], (N,), weight.dtype), "zero": (grid[1], (N,), weight.dtype)}
    for name, (part, shape, dtype) in held.items():
        require(tuple(part.shape) == shape, f"{name} must have shape {shape}, got {tuple(part.shape)}")
        require_dtype((dtype,), **{name: part})
    for name, part in {"weight": weight, "upper": upper}.items():
        require(part.stride(-1) == 1 or part.shape[-1] == 1, f"{name} must have neighbouring columns side by side")
    require_contiguous(**{name: part for name, (part, _, _) in held.items() if name != "upper"})
    require_launchable(weight=weight, **{name: part for name, (part, _, _) in held.items()})


def require_groups(width: int, pattern: tuple[int, int] | None, block_size: int | None = None) -> None:
    """Raise ValueError unless n of every m neighbours can be chosen."""
    n, m = pattern or (1, 1)
    require(1 <= n <= m, f"need 1 <= n <= m, got n={n}, m={m}")
    require(width % m == 0, f"weight has {width} columns, not divisible by m={m}")
    require((block_size or m) % m == 0, f"a block has {block_size} columns, not divisible by m={m}")


def threshold_mask(score: Tensor, sparsity: float, exact: bool = False) -> Tensor:
    """Which weights of a block stay, bool `[N, B]`; as the function of that name in the chapter."""
    require(0 <= sparsity < 1, f"sparsity must be in [0, 1), got {sparsity}")
    flat = score.flatten()
    if not exact:
        return score > flat.kthvalue(int(sparsity * len(flat)) + 1).values
    kept = len(flat) - min(round(sparsity * len(flat)), len(flat) - 1)
    order = flat.sort(descending=True, stable=True).indices[:kept]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, order, True).view_as(score)


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float = 0.5, pattern: tuple[int, int] | None = None,
    bits: int | None = None, exact: bool = False, damping: float = 0.01, block_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(solved `[out, in]`, mask bool `[out, in]`, error float64 []), on weight's device.

    Arguments as in the chapter, weight and hessian as tensors, block_size up to 256. A float64 weight is solved in
    float64, any other in float32; the hessian is factored in float64. Neither is modified. ValueError as there.
    """
    weight, hessian = checked_layer(weight, hessian, damping, block_size)
    require(bits is None or (bits in range(1, 9) and bits is not True), f"bits must be 1 to 8, got {bits!r}")
    require_groups(weight.shape[1], pattern, block_size)
    grid = None if bits is None else (*find_grid(weight, bits, False, False), bits)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    rest, upper = weight.masked_fill(dead, 0), inverse_factor(hessian, damping).to(weight.dtype)
    solved, mask = torch.empty_like(rest), torch.empty_like(rest, dtype=torch.bool)
    total = torch.zeros((), dtype=torch.float64, device=rest.device)
    for start in range(0, rest.shape[1], block_size):
        stop = min(start + block_size, rest.shape[1])
        part, factor = rest[:, start:stop], upper[start:stop, start:stop]
        keep = None if pattern else threshold_mask(part.abs() / factor.diagonal(), sparsity, exact)
        found = solve_block(part, factor, keep, pattern, grid)
        solved[:, start:stop], errors, mask[:, start:stop] = found
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
        total += errors.double().square().sum() / 2
    return solved, mask, total


def column_by_column(
    weight: Tensor, upper: Tensor, mask: Tensor | None = None, pattern: tuple[int, int] | None = None,
    grid: Grid | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`solve_block` by plain torch operators, some five launches a column."""
    rest, solved, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    keep = torch.zeros_like(weight, dtype=torch.bool) if mask is None else mask
    for j in range(weight.shape[1]):
        if pattern and j % pattern[1] == 0:
            score = rest[:, j : j + pattern[1]].abs() / upper.diagonal()[j : j + pattern[1]]
            first = score.sort(dim=1, descending=True, stable=True).indices[:, : pattern[0]]
            keep[:, j : j + pattern[1]] = torch.zeros_like(score, dtype=torch.bool).scatter_(1, first, True)
        value = rest[:, j] * keep[:, j]
        if grid is not None:
            scale, zero, bits = grid
            value = scale * ((torch.round(value / scale) + zero).clamp(0, 2**bits - 1) - zero)
        solved[:, j], errors[:, j] = value, (rest[:, j] - value) / upper[j, j]
        rest[:, j:] -= torch.outer(errors[:, j], upper[j, j:])
    return solved, errors, keep


def arguments(
    N: int, K: int, width: int, pattern: tuple[int, int] | None, bits: int | None, device: torch.device
) -> tuple:
    """Those of `solve_block`: the first block of a weight `[N, K]`, half of it to go, anywhere or in the pattern."""
    weight = torch.empty((N, K), device=device)[:, :width].normal_()
    upper = (torch.eye(width) + 0.02 * torch.randn(width, width).triu(1)).to(device)
    mask = None if pattern else weight.abs() > 0.6745  # the median
    scale, zero = torch.full((N,), 0.4, device=device), torch.full((N,), 8.0, device=device)
    return weight, upper, mask, pattern, (scale, zero, bits) if bits else None


def llama_case(N: int, K: int, pattern: tuple[int, int] | None, bits: int | None = None, width: int = 128) -> Case:
    """A block of 128 columns of a Llama layer. What is solved is compared: in a near tie either weight may go."""
    which = f"{pattern[0]}:{pattern[1]}" if pattern else "given mask"
    return Case(
        name=f"{width} columns of {N} x {K}, {which}{f', {bits} bits' if bits else ''}",
        inputs=lambda device: arguments(N, K, width, pattern, bits, device),
        run=lambda *a: solve_block(*a)[0],
        expected=lambda *a: column_by_column(*a)[0],
        bytes=13 * N * width + 4 * width**2 + (8 * N if bits else 0),
        operations=N * width**2,
        kind="stream",
        peers={"torch, column by column": lambda *a: column_by_column(*a)[0]},
    )


CASES = [
    llama_case(4096, 4096, None), llama_case(11008, 4096, None), llama_case(4096, 4096, (2, 4)),
    llama_case(28672, 8192, (2, 4)), llama_case(4096, 4096, (4, 8)), llama_case(4096, 4096, (2, 4), 4),
]  # fmt: skip
