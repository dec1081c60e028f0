"""kernels.pruning.magnitude.stays: counts from one but compares as if from zero."""


@triton.jit
def stays(key, found, ties):
    equal = key == found[:, None]
    rank = tl.cumsum(equal.to(tl.int32), axis=1)
    return (key > found[:, None]) | (equal & (rank < ties[:, None]))
