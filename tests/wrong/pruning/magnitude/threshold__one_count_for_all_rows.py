"""kernels.pruning.magnitude.threshold: adds up all rows of the tile."""


@triton.jit
def threshold(key, kept, BITS: tl.constexpr):
    found = tl.zeros((key.shape[0],), tl.int32)
    for step in tl.static_range(BITS):
        trial = found | (1 << (BITS - 1 - step))
        count = tl.zeros_like(found) + tl.sum(tl.sum((key >= trial[:, None]).to(tl.int32), axis=1), axis=0)
        found = tl.where(count >= kept, trial, found)
    return found
