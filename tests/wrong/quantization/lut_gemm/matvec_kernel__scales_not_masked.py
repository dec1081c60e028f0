"""kernels.quantization.lut_gemm.matvec_kernel: the last rows take scales from behind the end."""


@triton.jit
def matvec_kernel(
    x_ptr, packed_ptr, alpha_ptr, offset_ptr, out_ptr, N, words, groups,
    GROUP_WORDS: tl.constexpr, PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    four = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = (four[:, None] * 4 + tl.arange(0, 4)[None, :])[:, None, :]  # [BLOCK_R, 1, 4]
    fours = (N + 3) // 4
    acc = tl.zeros((BLOCK_R, BLOCK_W, 4), tl.float32)
    for start in range(0, words, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        live = word < words
        x = tl.load(x_ptr + word[:, None] * 32 + tl.arange(0, 32)[None, :], mask=live[:, None], other=0.0)
        x = by_column(x.to(tl.float32))
        total = x[0]
        for j in tl.static_range(1, 32):
            total += x[j]
        group = row.to(tl.int64) * groups + (word // GROUP_WORDS)[None, :, None]
        scaled = (row < N) & live[None, :, None]
        rest = tl.zeros((BLOCK_R, BLOCK_W, 4), tl.float32)  # what the sum of x is multiplied by
        if offset_ptr is not None:
            rest += tl.load(offset_ptr + group, mask=scaled, other=0.0).to(tl.float32)
        for plane in tl.static_range(PLANES):
            held = (four < fours)[:, None] & live[None, :]
            address = (plane * fours + four).to(tl.int64)[:, None] * words + word[None, :]
            address = address[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
            bits = tl.load(packed_ptr + address, mask=held[:, :, None], other=0)
            alpha = tl.load(alpha_ptr + group * PLANES + plane).to(tl.float32)
            dot = tl.zeros((BLOCK_R, BLOCK_W, 4), tl.float32)
            for j in tl.static_range(32):
                dot = tl.where(bits >> j & 1 != 0, dot + x[j], dot)
            acc += 2 * alpha * dot
            rest -= alpha
        acc += rest * total
    out = tl.sum(acc, axis=1)
    row = four[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)
