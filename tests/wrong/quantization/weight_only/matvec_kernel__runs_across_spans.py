"""kernels.quantization.weight_only.matvec_kernel: takes run r of all spans for neighbouring columns."""


@triton.jit
def matvec_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, out_ptr, N, spans, groups, magic, BITS: tl.constexpr, RUNS: tl.constexpr,
    GROUP_RUNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = RUNS * BITS // 4
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row64 = row.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    for start in range(0, spans, BLOCK_S):
        span = start + tl.arange(0, BLOCK_S)
        live = (row < N)[:, None] & (span < spans)[None, :]
        address = (row64 * PLANES * spans + span[None, :])[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        quads = load_quads(packed_ptr + address, spans * 4, live[:, :, None], BITS)  # [BLOCK_N, BLOCK_S, 4]
        for run in tl.static_range(RUNS):
            at = run * spans + span
            group = row64 * groups + (at // GROUP_RUNS)[None, :]
            scale = tl.load(scale_ptr + group, mask=live, other=0.0)
            zero = tl.load(zero_ptr + group, mask=live, other=0)
            column = at[:, None] * RUN + tl.arange(0, RUN)[None, :]
            x = tl.load(x_ptr + column, mask=(span < spans)[:, None], other=0.0)
            total = tl.sum(x.to(tl.float32), axis=1)
            # What 16.0 adds to the products: 16 x at bit 19; at bit 15, where x is taken 16 times, 256 x.
            surplus = tl.sum(x.to(tl.float32) * tl.where(column // 4 % 2 == 0, 256.0, 16.0), axis=1)
            x, words = by_place(x), nibbles(quads, run, BITS)
            products = tl.zeros((BLOCK_N, BLOCK_S, 4), tl.float32)
            for place in tl.static_range(0, 8, 2):  # places at bits 15 and 19
                pair = words << (15 - 4 * place) if place < 4 else words >> (4 * place - 15)
                products += counted(pair, 15, magic) * (16 * x[place].to(tl.float32))[None, :, :]
                products += counted(pair, 19, magic) * x[place + 1].to(tl.float32)[None, :, :]
            dot = tl.sum(products, axis=2) - surplus[None, :]
            acc += scale.to(tl.float32) * (dot - zero.to(tl.float32) * total[None, :])
    out = tl.sum(acc, axis=1)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)
