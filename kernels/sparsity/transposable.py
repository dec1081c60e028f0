"""Transposable 2:4 masks in Triton: all 90 masks of every 4 × 4 block are tried on chip, and one is written.

weight [N, K] of b bytes a number -> mask [N, K], one byte each:
    floor        (b + 1) N K bytes: the weight is read once, the mask is written once
    operations   2 · 128 · N K: 16 magnitudes of a block times 90 masks, filled up to 128 columns
    naive        blocks copied together (2 b N K), scores [N K / 16, 90] in float32 written and read again (45 N K),
                 the best found and its mask gathered: more than 15 times the floor's bytes in 16 bits
The scores of a block are a product of its magnitudes [1, 16] and the table of masks [16, 90] of zeros and ones, so that
tensor cores add them up; products by 0 and 1 are exact, and sums are float32. What they do not do is the choice: eight
comparisons with their index for each weight. With the load these are 67 instructions of a thread for each weight, where
its 3 bytes leave an H200 time for 19 (triton 3.7.1, sm_90, bfloat16; counted, not timed): memory does not bound this.
The table is 1440 bytes and comes from the first-level cache. Blocks are cut out of a row-major tile in registers, so
that whole rows of the tile are loaded at once.
Method: as chapters/sparsity/transposable.py, `best_mask`, for blocks of 4 × 4.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST = 128  # patterns in a table
LARGEST = {torch.float16: 65504.0, torch.bfloat16: 2.0**120, torch.float32: 2.0**120}  # eight of them still add up


@triton.jit
def first_best(blocks, table):
    """Which pattern keeps the most of each block: int32 [B], of equal sums the first.

    blocks [B, 16] are finite magnitudes, row by row; table [16, P] holds patterns of zeros and ones in its columns, in
    the dtype of blocks. Sums are float32. B and P are powers of two, from 16 on. Columns of zeros at the end of the
    table are never better than those before them.
    """
    score = tl.dot(blocks, table, input_precision="ieee")
    return tl.argmax(score, axis=1)


@triton.jit
def mask_kernel(
    weight, patterns, mask, N, K, count, largest,
    HIGH: tl.constexpr, WIDE: tl.constexpr, PATTERNS: tl.constexpr,
):  # fmt: skip
    """HIGH by WIDE blocks of weight [N, K]; patterns uint8 [count, 16], of which the best of each goes to mask."""
    row = tl.program_id(1).to(tl.int64) * (4 * HIGH) + tl.arange(0, 4 * HIGH)
    column = tl.program_id(0) * (4 * WIDE) + tl.arange(0, 4 * WIDE)
    live = (row < N)[:, None] & (column < K)[None, :]
    offsets = row[:, None] * K + column[None, :]
    magnitude = tl.abs(tl.load(weight + offsets, mask=live, other=0.0)).to(tl.float32)
    magnitude = tl.where(magnitude < largest, magnitude, largest).to(weight.dtype.element_ty)  # NaN is not less
    blocks = magnitude.reshape(HIGH, 4, WIDE, 4).permute(0, 2, 1, 3).reshape(HIGH * WIDE, 16)
    place, pattern = tl.arange(0, 16), tl.arange(0, PATTERNS)
    table = tl.load(patterns + pattern[None, :] * 16 + place[:, None], mask=(pattern < count)[None, :], other=0)
    best = first_best(blocks, table.to(blocks.dtype))
    kept = tl.load(patterns + best[:, None] * 16 + place[None, :])
    tile = kept.reshape(HIGH, WIDE, 4, 4).permute(0, 2, 1, 3).reshape(4 * HIGH, 4 * WIDE)
    tl.store(mask + offsets, tile, mask=live)


def best_mask(weight: Tensor, patterns: Tensor, high: int = 1, wide: int = 64) -> Tensor:
    """In every 4 × 4 block of weight [N, K] keep what the pattern of the largest sum of magnitudes keeps: bool [N, K].

    weight float16, bfloat16 or float32, patterns bool [P, 4, 4], at most 128, both contiguous, 4 divides N and K. Sums
    are float32; of equal ones the first pattern is taken. NaN, infinity and what is above 2¹²⁰ count as 2¹²⁰ (float16:
    as its largest number). `high` by `wide` blocks, powers of two, 16 at least together, make one program's tile.
    Raises ValueError for the shapes, TypeError for the dtypes.
    """
    require(weight.dim() == 2, f"weight must be [N, K], got shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    require(rows % 4 == 0 and columns % 4 == 0, f"weight is {rows} by {columns}, both must be divisible by 4")
    fits = patterns.dim() == 3 and patterns.shape[1:] == (4, 4) and 1 <= len(patterns) <= MOST
    require(fits, f"patterns must be [1 .. {MOST}, 4, 4], got shape {tuple(patterns.shape)}")
    require_dtype(DTYPES, weight=weight)
    require_dtype((torch.bool,), patterns=patterns)
    require_contiguous(weight=weight, patterns=patterns)
    require_launchable(weight=weight, patterns=patterns)
    mask = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    if mask.numel():
        grid = (triton.cdiv(columns, 4 * wide), triton.cdiv(rows, 4 * high))
        sizes = {"HIGH": high, "WIDE": wide, "PATTERNS": MOST}
        stored = patterns.view(torch.uint8), mask.view(torch.uint8)
        mask_kernel[grid](weight, *stored, rows, columns, len(patterns), LARGEST[weight.dtype], **sizes, num_warps=4)
    return mask


def two_of_four(device: torch.device) -> Tensor:
    """The 90 masks with two in every row and column: bool [90, 4, 4], in falling order as binary numbers."""
    rows = [[place in kept for place in range(4)] for kept in itertools.combinations(range(4), 2)]
    masks = torch.tensor(list(itertools.product(rows, repeat=4)))
    return masks[(masks.sum(dim=1) == 2).all(dim=1)].to(device)


def torch_best(weight: Tensor, patterns: Tensor) -> Tensor:
    """The same by plain torch operators."""
    blocks = weight.abs().float().unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)  # [I, J, 16]
    best = (blocks @ patterns.flatten(1).float().T).argmax(-1)
    return patterns[best].transpose(1, 2).reshape(weight.shape)


def case(rows: int, columns: int) -> Case:
    """A Llama weight. torch's own `_sparse_semi_structured_tile` is greedy and chooses other masks: no peer."""

    def inputs(device: torch.device) -> tuple[Tensor, Tensor]:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        if device.type == "cuda":  # whole numbers add up exactly, in any order
            weight.copy_(torch.randint(-127, 128, weight.shape, device=device))
        return weight, two_of_four(device)

    return Case(
        name=f"2:4 both ways N={rows} K={columns}",
        inputs=inputs,
        run=best_mask,
        expected=torch_best,
        bytes=3 * rows * columns + 90 * 16,
        operations=2 * 128 * rows * columns,
        kind="stream",
        narrow_stores="8 bytes of mask for a thread; 16 would double its sums in registers, and sums bind, not bytes",
        peers={"torch": torch_best},
    )


CASES = [case(4096, 4096), case(4096, 11008)]
