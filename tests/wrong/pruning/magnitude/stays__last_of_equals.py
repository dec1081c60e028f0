"""kernels.pruning.magnitude.stays: counts from the end of the row."""


@triton.jit
def stays(key, found, ties):
    equal = key == found[:, None]
    rank = tl.sum(equal.to(tl.int32), axis=1)[:, None] + 1 - tl.cumsum(equal.to(tl.int32), axis=1)
    return (key > found[:, None]) | (equal & (rank <= ties[:, None]))
