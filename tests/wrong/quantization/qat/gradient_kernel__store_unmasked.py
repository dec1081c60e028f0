"""kernels.quantization.qat.gradient_kernel: stores the tail of the last tile."""


@triton.jit
def gradient_kernel(
    x_ptr, scale_ptr, dy_ptr, dx_ptr, share_ptr, groups, n, blocks, factor, LOW: tl.constexpr, HIGH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, rows_live, offset, live, block = find_tile(groups, n, blocks, ROWS, BLOCK)
    scale = tl.load(scale_ptr + row, mask=rows_live, other=1.0)[:, None]
    x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offset, mask=live, other=0.0)
    q = tl.div_rn(x, tl.broadcast_to(scale, (ROWS, BLOCK)))
    outside = (q < LOW) | (q > HIGH)
    tl.store(dx_ptr + offset, tl.where(outside, 0.0, dy).to(dx_ptr.dtype.element_ty), mask=rows_live[:, None])
    change = nearest(q, LOW, HIGH) - tl.where(outside, 0.0, q)
    share = factor * tl.sum(dy.to(tl.float32) * change, axis=1)
    tl.store(share_ptr + row * blocks + block, share, mask=rows_live)
