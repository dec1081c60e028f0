"""kernels.quantization.gptq.solve_kernel: stores rows that are not there."""


@triton.jit
def solve_kernel(
    weight_ptr, upper_ptr, scale_ptr, zero_ptr, group_ptr, codes_ptr, errors_ptr, N, weight_stride, upper_stride,
    groups, width, last, MAGIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    live = (row < N)[:, None] & (column < width)[None, :]
    # Right of column j the tile holds W, repaired so far; left of it errors.
    tile = tl.load(weight_ptr + row[:, None] * weight_stride + column[None, :], mask=live, other=0.0)
    codes = tl.zeros((BLOCK_N, BLOCK_C), tl.uint8)
    for j in range(width):
        later = tl.load(upper_ptr + j * upper_stride + column, mask=(column > j) & (column < width), other=0.0)
        pivot = tl.load(upper_ptr + j * upper_stride + j)
        grid = row * groups + tl.load(group_ptr + j)
        scale = tl.load(scale_ptr + grid, mask=row < N, other=1.0)
        zero = tl.load(zero_ptr + grid, mask=row < N, other=0.0)
        here = (column == j)[None, :]
        value = tl.sum(tl.where(here, tile, 0.0), axis=1)
        steps = tl.minimum(tl.maximum(quotient(value, scale), -512.0), 512.0)  # a code is at most 255
        code = tl.minimum(tl.maximum(steps + MAGIC - MAGIC + zero, 0.0), last)
        error = quotient(value - scale * (code - zero), pivot + tl.zeros_like(value))
        tile = tl.where(here, error[:, None], tile - error[:, None] * later[None, :])
        codes = tl.where(here, code.to(tl.uint8)[:, None], codes)
    live = (row < N + BLOCK_N)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    tl.store(codes_ptr + place, codes, mask=live)
    tl.store(errors_ptr + place, tile, mask=live)
