"""kernels.pruning.magnitude.stays: lets equals stay in the first `ties` columns, wherever the others are."""


@triton.jit
def stays(key, found, ties):
    equal = key == found[:, None]
    column = tl.arange(0, key.shape[1])[None, :]
    return (key > found[:, None]) | (equal & (column < ties[:, None]))
