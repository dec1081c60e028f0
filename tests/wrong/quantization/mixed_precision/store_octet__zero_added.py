"""kernels.quantization.mixed_precision.store_octet: adds the zero."""


@triton.jit
def store_octet(out_ptr, scale_ptr, zero_ptr, code, octet, end, GROUP: tl.constexpr):
    live = octet < end
    group = octet // (GROUP // 8)
    scale = tl.load(scale_ptr + group, mask=live, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group, mask=live, other=0).to(tl.int32)
    weight = (code + zero[:, None]).to(tl.float32) * scale[:, None]
    at = octet[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + at, weight.to(out_ptr.dtype.element_ty), mask=live[:, None])
