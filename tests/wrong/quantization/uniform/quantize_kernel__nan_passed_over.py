"""kernels.quantization.uniform.quantize_kernel: lets a NaN be quantized like a number."""


@triton.jit
def quantize_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, groups, n, up, down, positive,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64) * PARTS + tl.arange(0, PARTS)
    live = part < groups
    column = tl.arange(0, BLOCK)
    at = x_ptr + part[:, None] * n + column[None, :]
    x = tl.load(at, mask=live[:, None] & (column < n)[None, :], other=0.0).to(tl.float32)
    low, high = tl.minimum(tl.min(x, axis=1), 0.0), tl.maximum(tl.max(x, axis=1), 0.0)
    scale, zero = find_grid(low, high, up, down, positive, BITS, SYMMETRIC)
    broken = tl.sum(x * 0.0, axis=1)  # 0, or NaN if a number is NaN, which minimum and maximum pass over
    tl.store(scale_ptr + part, scale, mask=live)
    tl.store(zero_ptr + part, zero.to(tl.uint8), mask=live)
    least = -zero.to(tl.float32)
    steps = x * tl.div_rn(1.0, scale)[:, None]
    steps = tl.minimum(tl.maximum(steps, least[:, None]), (least + (2**BITS - 1))[:, None])
    store_codes(packed_ptr, rint_bits(steps) + zero[:, None], part, live, n, BITS)
