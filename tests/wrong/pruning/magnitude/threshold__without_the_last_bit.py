"""kernels.pruning.magnitude.threshold: leaves out the lowest bit."""


@triton.jit
def threshold(key, kept, BITS: tl.constexpr):
    found = tl.zeros((key.shape[0],), tl.int32)
    for step in tl.static_range(BITS - 1):
        trial = found | (1 << (BITS - 1 - step))
        count = tl.sum((key >= trial[:, None]).to(tl.int32), axis=1)
        found = tl.where(count >= kept, trial, found)
    return found
