"""kernels.attention.linformer.project_tiles: reads the mask of the first tile for every tile."""


@triton.jit
def project_tiles(
    acc, x_ptr, e_ptr, mask_ptr, step, row, first, last, S, L, slots, D: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    near, column = tl.arange(0, BLOCK), tl.arange(0, acc.shape[1])
    e_ptr += row.to(tl.int64)[:, None] * L + near[None, :]
    for start in range(first, last, BLOCK):
        live, inside = (column < D)[None, :], (row < slots)[:, None]
        if TAIL:
            live, inside = live & (start + near < S)[:, None], inside & (start + near < S)[None, :]
        if MASKED:
            token = tl.load(mask_ptr + near, mask=start + near < S, other=0) != 0
            live = live & token[:, None]
        rows = x_ptr + tl.full((), start, tl.int64) * step
        x = tl.load(rows + near[:, None] * step + column[None, :], mask=live, other=0.0)
        e = tl.load(e_ptr + start, mask=inside, other=0.0)
        acc = tl.dot(e, x, acc, input_precision="ieee")
    return acc
