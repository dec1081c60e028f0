"""kernels.pruning.magnitude.stays: keeps only what is above."""


@triton.jit
def stays(key, found, ties):
    equal = key == found[:, None]
    return (key > found[:, None]) & (ties[:, None] == ties[:, None])
