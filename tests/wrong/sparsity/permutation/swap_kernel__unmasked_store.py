"""kernels.sparsity.permutation.swap_kernel: writes past the last column."""


@triton.jit
def swap_kernel(weight, gains, N, K, ROWS: tl.constexpr, TILE: tl.constexpr):
    if tl.program_id(0) > tl.program_id(1):
        return
    left = tl.program_id(0) * TILE + tl.arange(0, TILE)
    right = tl.program_id(1) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, N, ROWS):
        row = start + tl.arange(0, ROWS)
        acc += tile_gains(load_magnitudes(weight, row, left, N, K), load_magnitudes(weight, row, right, N, K))
    acc = tl.where(left[:, None] // 4 == right[None, :] // 4, 0.0, acc)
    live = (left < K)[:, None] & (right < K)[None, :]
    tl.store(gains + left.to(tl.int64)[:, None] * K + right[None, :], acc, mask=(left < K)[:, None] & (right > -1)[None, :])
    tl.store(gains + right.to(tl.int64)[None, :] * K + left[:, None], acc, mask=(left < K)[:, None] & (right > -1)[None, :])
