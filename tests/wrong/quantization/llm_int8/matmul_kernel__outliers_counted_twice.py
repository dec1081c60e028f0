"""kernels.quantization.llm_int8.matmul_kernel: multiplies outlier columns in int8, too."""


@triton.jit
def matmul_kernel(
    x_ptr, maxima_ptr, columns_ptr, tiles_ptr, codes_ptr, absmax_ptr, exact_ptr, out_ptr, M, N, K,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    left, top = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1).to(tl.int64) * BLOCK_M
    row, column, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_live, column_live = row < M - top, column < N - left
    x_ptr += top * K + row[:, None] * K + inner[None, :]
    weight = left * K + column[:, None] * K + inner[None, :]
    maxima = tl.load(maxima_ptr + top + row, mask=row_live, other=0.0)
    inverse = tl.div_rn(127.0, tl.where(maxima > 0, maxima, float("inf")))[:, None]
    next_x = tl.load(x_ptr, mask=row_live[:, None] & (inner < K)[None, :], other=0.0)
    next_tile = tl.load(tiles_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    high = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x, tile, live, following = next_x, next_tile, inner < K - start, start + BLOCK_K
        next_x = tl.load(x_ptr + following, mask=row_live[:, None] & (inner < K - following)[None, :], other=0.0)
        next_tile = tl.load(tiles_ptr + following // BLOCK_K, mask=following < K, other=0)
        codes = tl.load(codes_ptr + weight + start, mask=column_live[:, None] & live[None, :], other=0)
        marked = (tl.load(columns_ptr + start + inner, mask=live, other=0) != 0)[None, :]
        regular = x.to(tl.float32)
        rounded = (regular * inverse + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
        acc = tl.dot(rounded, codes.T, acc, out_dtype=tl.int32)
        if tile != 0:
            outliers = tl.where(marked, x, 0.0).to(x.dtype)
            if EXACT:
                wanted = column_live[:, None] & marked
                precise = tl.load(exact_ptr + weight + start, mask=wanted, other=0.0).to(x.dtype)
            else:
                precise = codes.to(x.dtype)
            high = tl.dot(outliers, precise.T, high, input_precision="ieee")
    absmax = tl.load(absmax_ptr + left + column, mask=column_live, other=0.0)[None, :]
    out = acc.to(tl.float32) * (maxima[:, None] * absmax) * (1 / 16129)
    out += high if EXACT else high * (absmax * (1 / 127))
    out_ptr += top * N + left
    live = row_live[:, None] & column_live[None, :]
    tl.store(out_ptr + (row[:, None] * N + column[None, :]), out.to(out_ptr.dtype.element_ty), mask=live)
