"""kernels.pruning.magnitude.stays: ranks equals down the columns."""


@triton.jit
def stays(key, found, ties):
    equal = key == found[:, None]
    rank = tl.cumsum(equal.to(tl.int32), axis=0)
    return (key > found[:, None]) | (equal & (rank <= ties[:, None]))
