"""kernels.quantization.embedding_groups.quantize_kernel: x * (1 / scale) is not x / scale where that is a tie."""


@triton.jit
def quantize_kernel(
    x_ptr, order_ptr, scale_ptr, zero_ptr, codes_ptr, tokens, channels, size, HIGHEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BLOCK)
    inside = place < channels
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, tokens)):
        order = tl.load(order_ptr + place, mask=inside, other=0)
        x = tl.load(x_ptr + row * channels + place, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + place // size, mask=inside, other=1.0)
        zero = tl.load(zero_ptr + place // size, mask=inside, other=0.0)
        quotient = tl.gather(x, order.to(tl.int32), axis=0).to(tl.float32) * (1 / scale)
        quotient = tl.minimum(tl.maximum(quotient, -zero), HIGHEST - zero)
        code = (quotient + ONES) - ONES + zero
        tl.store(codes_ptr + row * channels + place, code.to(tl.uint8), mask=inside)
