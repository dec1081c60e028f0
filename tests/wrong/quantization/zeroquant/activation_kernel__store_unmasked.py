"""kernels.quantization.zeroquant.activation_kernel: writes the codes of the padding, too."""


@triton.jit
def activation_kernel(x_ptr, up_ptr, codes_ptr, scale_ptr, hidden, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < hidden
    x = tl.load(x_ptr + row * hidden + column, mask=live, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(up_ptr + row * hidden + column, mask=live, other=0.0).to(tl.float32)
        y = tl.div_rn(x, 1 + exp(-x)) * up
    else:
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    codes, step = row_codes(y)
    tl.store(codes_ptr + row * hidden + column, codes)
    tl.store(scale_ptr + row, step + tl.sum(y * 0.0, axis=0))  # NaN if a value is not finite
