"""kernels.sparsity.top_kast.two_thresholds: counts in float16, which has no 2049."""


@triton.jit
def two_thresholds(key, forward, backward, BITS: tl.constexpr):
    high = tl.zeros((key.shape[0],), tl.int32)
    low = tl.zeros((key.shape[0],), tl.int32)
    for step in tl.static_range(BITS):
        higher, lower = high | (1 << (BITS - 1 - step)), low | (1 << (BITS - 1 - step))
        high = tl.where(tl.sum((key >= higher[:, None]).to(tl.float16), axis=1) >= forward, higher, high)
        low = tl.where(tl.sum((key >= lower[:, None]).to(tl.float16), axis=1) >= backward, lower, low)
    return high, low
