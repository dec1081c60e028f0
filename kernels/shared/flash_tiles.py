"""Launch configurations of the FlashAttention kernels: tiles by head size, dtype and GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.shared.tiles import has_warpgroup_products

# (BLOCK_Q, BLOCK_K, warps, stages) by the largest head size that they serve. Chosen by their machine code: no register
# is spilled at the sizes of CASES, on sm_80 by TILES, on sm_90 and sm_100 by WIDE_TILES, which give each of the two
# warpgroups 64 rows of its own wherever registers allow it; narrower, both compute the same scores.
TILES = {
    "forward": {64: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    "key gradient": {64: (32, 128, 8, 2), 127: (32, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    "query gradient": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
}
WIDE_TILES = {
    "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    "key gradient": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 2)},
    "query gradient": {128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
}
TILE_FLOAT32 = (32, 16, 8, 2)  # no tensor cores in "ieee" precision: every product is unrolled into registers


def launch_options(kernel: str, q: Tensor, causal: bool, block_q: int | None, block_k: int | None) -> dict:
    """Keywords of a launch, a function of head size, dtype and GPU; block_q and block_k replace the tile if given."""
    table = (WIDE_TILES if has_warpgroup_products() else TILES)[kernel]
    return tile_options(table, q, block_q, block_k) | {"CAUSAL": causal}


def tile_options(table: dict[int, tuple], q: Tensor, block_q: int | None, block_k: int | None) -> dict:
    """The tile that a table of `TILES` has for the head size of q, as keywords; one that float32 fits for float32."""
    D = q.shape[-1]
    tile = TILE_FLOAT32 if q.dtype == torch.float32 else table[min(size for size in table if size >= D)]
    return {
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_Q": block_q or tile[0],
        "BLOCK_K": block_k or tile[1],
        "num_warps": tile[2],
        "num_stages": tile[3],
    }


# the kernels of `flash_variants` do more with each score; none of their options, nor all, spills on any of the three
VARIANT_TILES = {
    "forward": {128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    "key gradient": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "query gradient": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 2)},
}


def variant_options(kernel: str, q: Tensor, block_q: int | None, block_k: int | None) -> dict:
    """The same for `flash_variants`, which tells causal from other windows by itself.

    On sm_80 the forward pass takes half the keys: of 64, Triton 3.6 spills registers. That reads no more, but rescales
    the sums and waits at barriers twice as often.
    """
    table = VARIANT_TILES[kernel]
    if kernel == "forward" and not has_warpgroup_products():
        table = table | {128: (128, 32, 8, 3)}
    return tile_options(table, q, block_q, block_k)
