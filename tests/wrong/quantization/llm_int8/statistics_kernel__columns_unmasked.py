"""kernels.quantization.llm_int8.statistics_kernel: loads past the end of a row."""


@triton.jit
def statistics_kernel(x_ptr, maxima_ptr, columns_ptr, tiles_ptr, K, threshold, TILE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        size = tl.abs(
            tl.load(
                x_ptr + row * K + column,
            ).to(tl.float32)
        )
        regular = size < threshold  # false for NaN
        acc = tl.maximum(acc, tl.where(regular, size, 0.0))
        one, outlier = tl.full((BLOCK,), 1, tl.int8), (column < K) & ~regular
        tl.store(columns_ptr + column, one, mask=outlier)
        tl.store(tiles_ptr + column // TILE, one, mask=outlier)
    largest = tl.max(acc, axis=0)
    tl.store(maxima_ptr + row, tl.where(largest < LEAST, 0.0, largest))
