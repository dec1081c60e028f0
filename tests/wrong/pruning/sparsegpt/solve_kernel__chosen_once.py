"""kernels.pruning.sparsegpt.solve_kernel: chooses all groups from weights that nothing has repaired."""


@triton.jit
def solve_kernel(
    weight_ptr, upper_ptr, mask_ptr, scale_ptr, zero_ptr, solved_ptr, errors_ptr, N, weight_stride, upper_stride,
    width, n, m, last, CHOOSE: tl.constexpr, ROUND: tl.constexpr, MAGIC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    live = (row < N)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    # Right of column j the tile holds W, repaired so far; left of it errors.
    tile = tl.load(weight_ptr + row[:, None] * weight_stride + column[None, :], mask=live, other=0.0)
    solved = tl.zeros_like(tile)
    keep = tl.zeros((BLOCK_N, BLOCK_C), tl.int1)
    diagonal = tl.load(upper_ptr + column * (upper_stride + 1), mask=column < width, other=1.0)
    if not CHOOSE:
        keep = tl.load(mask_ptr + place, mask=live, other=0) != 0
    if ROUND:
        scale = tl.load(scale_ptr + row, mask=row < N, other=1.0)
        zero = tl.load(zero_ptr + row, mask=row < N, other=0.0)
    first = tl.abs(tile) / diagonal[None, :]
    for start in range(0, width, m):
        if CHOOSE:
            chosen = group_keeps(first, column, start, n, m)
            keep = tl.where(((column >= start) & (column < start + m))[None, :], chosen, keep)
        for j in range(start, start + m):
            later = tl.load(upper_ptr + j * upper_stride + column, mask=(column > j) & (column < width), other=0.0)
            pivot = tl.load(upper_ptr + j * upper_stride + j)
            here = (column == j)[None, :]
            value = tl.sum(tl.where(here, tile, 0.0), axis=1)
            result = tl.sum(tl.where(here & keep, tile, 0.0), axis=1)
            if ROUND:
                steps = tl.minimum(tl.maximum(quotient(result, scale), -512.0), 512.0)  # a code is at most 255
                result = scale * (tl.minimum(tl.maximum(steps + MAGIC - MAGIC + zero, 0.0), last) - zero)
            error = quotient(value - result, pivot + tl.zeros_like(value))
            tile = tl.where(here, error[:, None], tile - error[:, None] * later[None, :])
            solved = tl.where(here, result[:, None], solved)
    tl.store(solved_ptr + place, solved, mask=live)
    tl.store(errors_ptr + place, tile, mask=live)
    if CHOOSE:
        tl.store(mask_ptr + place, keep.to(tl.uint8), mask=live)
