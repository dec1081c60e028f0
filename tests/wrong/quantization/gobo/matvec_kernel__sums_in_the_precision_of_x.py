"""kernels.quantization.gobo.matvec_kernel: sums in the precision of x."""


@triton.jit
def matvec_kernel(
    x_ptr, packed_ptr, centroid_ptr, start_ptr, column_ptr, extra_ptr, out_ptr, N, K, fields,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    quad = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    begin = tl.load(start_ptr + row, mask=row < N, other=0)
    end = tl.load(start_ptr + row + 1, mask=row < N, other=0)
    outliers = tl.zeros((BLOCK_R, 4, BLOCK_O), tl.float32)
    for first in range(0, tl.max(end - begin), BLOCK_O):
        at = begin[:, :, None] + first + tl.arange(0, BLOCK_O)[None, None, :]
        inside = at < end[:, :, None]
        column = tl.load(column_ptr + at, mask=inside, other=0).to(tl.int32)
        x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        outliers += x * tl.load(extra_ptr + at, mask=inside, other=0.0).to(tl.float32)
    table = tl.load(centroid_ptr + tl.arange(0, 1 << BITS)).to(tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_F, 4, 4), x_ptr.dtype.element_ty)  # [quad, field, row, word]
    for first in range(0, fields, BLOCK_F):
        field = first + tl.arange(0, BLOCK_F)
        live = ((quad * 4 < N)[:, None] & (field < fields)[None, :])[:, :, None]
        at = (quad[:, None] * BITS * fields + field[None, :])[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        words = load_nibbles(packed_ptr, at, fields * 4, live, BITS)
        column = field[:, None] * FIELD + tl.arange(0, FIELD)[None, :]
        x = by_place(tl.load(x_ptr + column, mask=column < K, other=0.0))
        for place in tl.static_range(8):
            weight = looked_up(table, words >> 4 * place & (1 << BITS) - 1)
            acc += (weight * x[place].to(tl.float32)[None, :, None, :]).to(acc.dtype)
    out = tl.sum(tl.sum(acc, axis=3), axis=1).to(acc.dtype) + tl.sum(outliers, axis=2)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)
