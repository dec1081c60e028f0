"""kernels.quantization.smoothquant.matmul_kernel: above 2^24 a float32 sum loses what is odd."""


@triton.jit
def matmul_kernel(
    x, weight, x_scale, weight_scale, out, M, N, K, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BULK: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    top, left = row_tile * BLOCK_M, column_tile * BLOCK_N
    row, column, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_live, column_live = row < M - top, column < N - left
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if BULK:
            x_tile, weight_tile = x.load([top, start]), weight.load([left, start])
        else:
            live = (k < K - start)[None, :]
            x_from, weight_from = x + top.to(tl.int64) * K + start, weight + left.to(tl.int64) * K + start
            x_tile = tl.load(x_from + (row[:, None] * K + k[None, :]), mask=row_live[:, None] & live, other=0)
            offsets = column[:, None] * K + k[None, :]
            weight_tile = tl.load(weight_from + offsets, mask=column_live[:, None] & live, other=0)
        acc = acc + tl.dot(x_tile, weight_tile.T, out_dtype=tl.int32).to(tl.float32)
    row_scale = tl.load(x_scale + (top + row) * PER_TOKEN, mask=row_live, other=0.0)
    column_scale = tl.load(weight_scale + (left + column) * PER_CHANNEL, mask=column_live, other=0.0)
    scaled = acc.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    out += top.to(tl.int64) * N + left
    live = row_live[:, None] & column_live[None, :]
    tl.store(out + (row[:, None] * N + column[None, :]), scaled.to(out.dtype.element_ty), mask=live)
