"""The end of a decode step that was split: partial results over some positions each, made one by their sums."""

import math

import triton
import triton.language as tl

INFINITY = tl.constexpr(math.inf)


@triton.jit
def combine_kernel(partial_ptr, lse_ptr, out_ptr, shares, D: tl.constexpr, SHARES: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [rows, D]: the shares of partial [rows, shares, D], weighted by exp2(lse). One program: one row.

    A share with an lse of -inf saw no position, and is not read; if none saw any, the row is NaN.
    """
    query = tl.program_id(0).to(tl.int64)
    share, column = tl.arange(0, SHARES), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + query * shares + share, mask=share < shares, other=-INFINITY)
    weights = tl.exp2(lse - tl.max(lse, 0))
    live = (lse > -INFINITY)[:, None] & (column < D)[None, :]
    address = (query * shares + share)[:, None] * D + column[None, :]
    partial = tl.load(partial_ptr + address, mask=live, other=0.0)
    out = tl.sum(partial * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + query * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)
