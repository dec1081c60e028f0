"""kernels.pruning.magnitude.stays: counts the equals before, and lets one too many stay."""


@triton.jit
def stays(key, found, ties):
    equal = key == found[:, None]
    rank = tl.cumsum(equal.to(tl.int32), axis=1) - equal.to(tl.int32)
    return (key > found[:, None]) | (equal & (rank <= ties[:, None]))
