"""kernels.attention.lsh.merge_kernel: takes natural logarithms for those of base 2."""


@triton.jit
def merge_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    live = row < rows
    inside = live[:, None] & (column < D)[None, :]
    maximum = tl.full((BLOCK,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    place = row
    for _ in range(0, ROUNDS):
        lse = tl.load(lses_ptr + place, mask=live, other=0.0)
        outs = tl.load(outs_ptr + place[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
        new_maximum = tl.maximum(maximum, lse)
        weight, rescale = tl.exp2(lse - new_maximum), tl.exp2(maximum - new_maximum)
        total = total * rescale + weight
        acc = acc * rescale[:, None] + outs * weight[:, None]
        maximum = new_maximum
        place += rows
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + column[None, :], out, mask=inside)
    tl.store(lse_ptr + row, (maximum + tl.log2(total)) * LN2, mask=live)
