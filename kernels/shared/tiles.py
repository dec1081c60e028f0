"""Tiles of a matrix that lies anywhere in memory: what Triton kernels over [batch, heads, length, D] tensors share.

A tensor is given by its pointer and its tuple of strides, last axis contiguous; a tile is BLOCK rows of one head, its
D columns padded to BLOCK_D, a power of two. Offsets of heads and of tiles are int64, those within a tile are not. Where
D is a multiple of 8 the strides must be, too: then 16 bytes are loaded at a time.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from kernels.guard import interpreting


@triton.jit
def aligned(stride, D: tl.constexpr):
    """The stride, written so that the compiler sees that it is a multiple of 8. Multiples of 16 it sees by itself."""
    return stride // 8 * 8 if D % 16 == 8 else stride


@triton.jit
def head_start(batch, head, stride, D: tl.constexpr):
    """Offset of a head's first row; int64, because a batch of long sequences holds more than 2^31 numbers."""
    return batch.to(tl.int64) * aligned(stride[0], D) + head.to(tl.int64) * aligned(stride[1], D)


@triton.jit
def tile_offsets(start, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [BLOCK, BLOCK_D] from a head's first row; only that of the tile's first row may need int64."""
    step = aligned(stride[2], D)
    first = tl.full((), start, tl.int64) * step
    return first + (tl.arange(0, BLOCK)[:, None] * step + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def tile_live(start, length, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask [BLOCK, BLOCK_D] of what lies inside [length, D]."""
    live = (start + tl.arange(0, BLOCK) < length)[:, None]
    if D != BLOCK_D:
        live = live & (tl.arange(0, BLOCK_D) < D)[None, :]
    return live


@triton.jit
def load_tile(
    ptr, start, stride, length, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False
):
    """Rows start .. start + BLOCK of a head [length, D]; what lies outside reads as zero. WHOLE: no row does."""
    pointers = ptr + tile_offsets(start, stride, D, BLOCK, BLOCK_D)
    if WHOLE and D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=tile_live(start, length, D, BLOCK, BLOCK_D), other=0.0)


@triton.jit
def store_tile(ptr, tile, start, stride, length, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverse of `load_tile`, rounding to the dtype behind `ptr`."""
    live = tile_live(start, length, D, BLOCK, BLOCK_D)
    tl.store(ptr + tile_offsets(start, stride, D, BLOCK, BLOCK_D), tile.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def visible_keys(start, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """(whole, last) for the query tile at `start`: whole key tiles below `whole` are seen by all its queries, keys from
    `last` on by none."""
    last = S
    whole = S
    if CAUSAL:
        last = tl.minimum(S, tl.maximum(start + BLOCK_Q + S - T, 0))
        whole = tl.minimum(S, tl.maximum(start + 1 + S - T, 0))
    return whole // BLOCK_K * BLOCK_K, last


@triton.jit
def visible(start, row, T, S, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """Mask, [BLOCK_Q, BLOCK_K] or one row for all: which queries `row` see which keys of the tile at `start`."""
    column = start + tl.arange(0, BLOCK_K)
    if CAUSAL:
        live = column[None, :] <= row[:, None] + (S - T)  # and therefore below S, for queries below T
    else:
        live = (column < S)[None, :]
    return live


def has_warpgroup_products() -> bool:
    """Whether the GPU compiled for multiplies by wgmma or tcgen05 (sm_90 to sm_11x), whose operands need no registers.

    Elsewhere it is mma.sync, which leaves room for smaller tiles; so it is taken to be in the interpreter.
    """
    if interpreting():
        return False
    active: Any = driver.active
    return 90 <= active.get_current_target().arch < 120


def loadable(tensor: Tensor) -> bool:
    """Whether `load_tile` can load it: last axis contiguous, strides multiples of 8 where D is an odd multiple."""
    D, strides = tensor.shape[3], [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return (D == 1 or tensor.stride(3) == 1) and (D % 16 != 8 or all(step % 8 == 0 for step in strides[:-1]))
