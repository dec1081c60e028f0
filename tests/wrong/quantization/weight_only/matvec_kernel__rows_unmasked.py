"""kernels.quantization.weight_only.matvec_kernel: loads packed words of rows that do not exist."""


@triton.jit
def matvec_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, N, quads, groups, magic,
    GROUP_QUADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row64 = row.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    for start in range(0, quads, BLOCK_Q):
        quad = start + tl.arange(0, BLOCK_Q)
        live = (row < N)[:, None] & (quad < quads)[None, :]
        group = row64 * groups + (quad // GROUP_QUADS)[None, :]
        scale = tl.load(scale_ptr + group, mask=live, other=0.0)
        zero = tl.load(zero_ptr + group, mask=live, other=0)
        address = (row64 * quads + quad[None, :])[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        packed = tl.load(packed_ptr + address, mask=(quad < quads)[None, :, None], other=0)  # [BLOCK_N, BLOCK_Q, 4]
        column = quad[:, None] * QUAD + tl.arange(0, QUAD)[None, :]
        x = tl.load(x_ptr + column, mask=(quad < quads)[:, None], other=0.0)
        total = tl.sum(x.to(tl.float32), axis=1)
        # What 16.0 adds to the products: 16 x at bit 19; at bit 15, where x is taken 16 times, 256 x.
        surplus = tl.sum(x.to(tl.float32) * tl.where(column // 4 % 2 == 0, 256.0, 16.0), axis=1)
        x = by_place(x)
        products = tl.zeros((BLOCK_N, BLOCK_Q, 4), tl.float32)
        for place in tl.static_range(0, 8, 2):
            pair = packed << (15 - 4 * place) if place < 4 else packed >> (4 * place - 15)  # places at bits 15 and 19
            products += counted(pair, 15, magic) * (16 * x[place].to(tl.float32))[None, :, :]
            products += counted(pair, 19, magic) * x[place + 1].to(tl.float32)[None, :, :]
        dot = tl.sum(products, axis=2) - surplus[None, :]
        acc += scale.to(tl.float32) * (dot - zero.to(tl.float32) * total[None, :])
    out = tl.sum(acc, axis=1)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)
