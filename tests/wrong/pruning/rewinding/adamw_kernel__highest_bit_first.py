"""kernels.pruning.rewinding.adamw_kernel: reads the bits of a byte from the highest."""


@triton.jit
def adamw_kernel(
    weight, gradient, mask, mean, square, new_weight, new_mean, new_square, n,
    shrink, beta1, rest1, beta2, rest2, rate, root, eps, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    octet = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    lane = tl.arange(0, 8)
    at = octet[:, None] * 8 + lane[None, :]
    live = at < n
    if BITS:
        byte = tl.load(mask + octet, mask=octet * 8 < n, other=0).to(tl.int32)
        keep = (byte[:, None] >> (7 - lane)[None, :]) & 1 != 0
    else:
        keep = tl.load(mask + at, mask=live, other=0) != 0
    g = tl.where(keep, tl.load(gradient + at, mask=live, other=0.0).to(tl.float32), 0.0)
    m = beta1 * tl.load(mean + at, mask=live, other=0.0) + rest1 * g
    v = beta2 * tl.load(square + at, mask=live, other=0.0) + rest2 * g * g
    w = shrink * tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
    w -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root) + eps)
    tl.store(new_weight + at, tl.where(keep, w, 0.0).to(new_weight.dtype.element_ty), mask=live)
    tl.store(new_mean + at, tl.where(keep, m, 0.0), mask=live)
    tl.store(new_square + at, tl.where(keep, v, 0.0), mask=live)
