"""kernels.quantization.zeroquant.rms_norm_kernel: uses the first gain for all columns."""


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, residual_ptr, codes_ptr, scale_ptr, hidden_ptr, dim, eps,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < dim
    x = tl.load(x_ptr + row * dim + column, mask=live, other=0.0)
    if RESIDUAL:
        other = tl.load(residual_ptr + row * dim + column, mask=live, other=0.0)
        x = (x.to(tl.float32) + other.to(tl.float32)).to(x.dtype)
        tl.store(hidden_ptr + row * dim + column, x, mask=live)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + column * 0, mask=live, other=0.0).to(tl.float32)
    codes, step = row_codes(x * weight)
    tl.store(codes_ptr + row * dim + column, codes, mask=live)
    mean = tl.sum(x * x, axis=0) / dim
    scale = step / tl.sqrt(mean + eps)
    tl.store(scale_ptr + row, scale + mean * 0.0)  # NaN if the sum is not finite, which a maximum does not show
