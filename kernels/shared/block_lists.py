"""Attention masks as kernels read them: for each row of blocks a list of the live ones, and bits for the partial ones.

A block of queries and keys is dead, full or partial. A row's list names its partial blocks first, then its full ones;
of a partial block every pair has a bit, of the others nothing is stored. Per row of C blocks that is 16 + 4 C bytes,
and block_q · block_k / 8 bytes for each partial block: 2 KB at 128 × 128, where its keys and values have 64.
Lists are kept by rows, for out and dQ, and by columns, for dK and dV; of what a mask of the chapter holds,
`on_device` makes both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.guard import require, require_dtype
from kernels.shared.flash_tiles import tile_options
from kernels.shared.tiles import has_warpgroup_products

SIZES = (16, 32, 64, 128, 256)


class BlockLists(NamedTuple):
    """Live blocks by rows, for M masks (1 or one for each head) of R rows and C columns of blocks.

    table    int32 `[M, R, 4]`: (row, partial blocks, live blocks, first slot in bits); rows with most live blocks first
    indices  int32 `[M, R, C]`, not in the table's order: columns of a row's partial blocks, of full ones, others
    bits     uint8 `[P, rows of a block, columns of a block // 8]`; bit c % 8 of byte c // 8 is column c
    """

    table: Tensor
    indices: Tensor
    bits: Tensor


class DeviceMask(NamedTuple):
    """A mask of `shape` (T, S), its blocks `size` (block_q, block_k), on a device: lists by queries and by keys."""

    shape: tuple[int, int]
    size: tuple[int, int]
    rows: BlockLists
    columns: BlockLists


def lists(partial: Tensor, full: Tensor, tokens: Tensor) -> BlockLists:
    """Lists from grids `[M, R, C]`, bool, and the masks `[P, rows, columns]` of the partial blocks in their order."""
    rank = torch.where(partial, 0, torch.where(full, 1, 2))
    several, live = partial.sum(-1), (partial | full).sum(-1)  # [M, R]
    first = partial.flatten().cumsum(0).view_as(partial)[..., -1] - several
    row = torch.arange(partial.shape[1]).expand_as(live)
    order = live.sum(0).argsort(descending=True, stable=True)  # one for all masks: a program may serve several heads
    table = torch.stack([row, several, live, first], dim=-1)[:, order]
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    bits = (tokens.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return BlockLists(*(x.contiguous() for x in (table.int(), rank.argsort(dim=-1, stable=True).int(), bits)))


def both_ways(shape: tuple[int, int], partial: Tensor, full: Tensor, tokens: Tensor, device: Any) -> DeviceMask:
    """Lists by rows and by columns, moved to a device."""
    slots = (partial.flatten().cumsum(0) - 1).view_as(partial).mT
    turned = partial.mT, full.mT, tokens[slots[partial.mT]].mT
    rows, columns = (BlockLists(*(x.to(device) for x in lists(*way))) for way in ((partial, full, tokens), turned))
    return DeviceMask(shape, (tokens.shape[1], tokens.shape[2]), rows, columns)


def on_device(mask: Any, device: torch.device | str) -> DeviceMask:
    """A `BlockMask` of the chapter as the kernels want it.

    mask: shape (T, S); block_q, block_k, each 16, 32, 64, 128 or 256; `partial`, `full` `[M, R, C]` and `tokens` `[P,
    block_q, block_k]`, bool arrays or tensors. Raises ValueError for other block sizes, and for grids and tokens that
    do not fit them, TypeError for other dtypes.
    """
    for name, block in (("block_q", mask.block_q), ("block_k", mask.block_k)):
        require(block in SIZES, f"{name} must be one of {SIZES} for the kernels, got {block}")
    partial, full, tokens = (torch.as_tensor(x) for x in (mask.partial, mask.full, mask.tokens))
    require_dtype((torch.bool,), partial=partial, full=full, tokens=tokens)
    grid = (triton.cdiv(mask.shape[0], mask.block_q), triton.cdiv(mask.shape[1], mask.block_k))
    for name, found in (("partial", partial), ("full", full)):
        fits = found.dim() == 3 and tuple(found.shape[1:]) == grid and len(found) == len(full)
        require(fits, f"{name} must be [M, {grid[0]}, {grid[1]}], got {tuple(found.shape)}")
    expected = (int(partial.sum()), mask.block_q, mask.block_k)
    require(tuple(tokens.shape) == expected, f"tokens must be {expected}, got {tuple(tokens.shape)}")
    require(not bool((partial & full).any()), "a block must not be partial and full")
    return both_ways(tuple(mask.shape), partial, full, tokens, device)


# (BLOCK_Q, BLOCK_K, warps, stages) by the largest head size that they serve, as in flash_tiles.py; narrower where the
# bits of a partial block would spill registers.
TILES = {
    "forward": {64: (64, 64, 4, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 3)},
    "key gradient": {64: (64, 32, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "query gradient": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
}
WIDE_TILES = {
    "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    "key gradient": {64: (64, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "query gradient": {128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
}


def launch_options(kernel: str, q: Tensor, mask: DeviceMask) -> dict:
    """Keywords of a launch, a function of head size, dtype, GPU and the mask's blocks, into which tiles must fit."""
    options = tile_options((WIDE_TILES if has_warpgroup_products() else TILES)[kernel], q, None, None)
    blocks = {"BLOCK_Q": min(options["BLOCK_Q"], mask.size[0]), "BLOCK_K": min(options["BLOCK_K"], mask.size[1])}
    return options | blocks | {"SIZE_Q": mask.size[0], "SIZE_K": mask.size[1]}


@triton.jit
def read_table(table_ptr, mask_row, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """(row of blocks, partial blocks, live blocks, first slot, part) of tile program_id(1), of SIZE // BLOCK in a row.

    mask_row: the table's first row for this head's mask. The slot is int64: there may be 2^31 bytes of bits.
    """
    entry, part = tl.program_id(1) // (SIZE // BLOCK), tl.program_id(1) % (SIZE // BLOCK)
    place = table_ptr + (mask_row + entry) * 4
    slot = tl.load(place + 3).to(tl.int64)
    return tl.load(place), tl.load(place + 1), tl.load(place + 2), slot, part


@triton.jit
def load_seen(bits_ptr, part, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bool [ROWS, COLUMNS]: tile `part` along the columns of a block whose rows are SIZE bits, from bits_ptr on."""
    byte = part * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    held = tl.load(bits_ptr + tl.arange(0, ROWS)[:, None] * (SIZE // 8) + byte[None, :]).to(tl.int32)
    bits = (held[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0
