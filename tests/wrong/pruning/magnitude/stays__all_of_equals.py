"""kernels.pruning.magnitude.stays: keeps all that reach the threshold."""


@triton.jit
def stays(key, found, ties):
    equal = key == found[:, None]
    return (key > found[:, None]) | equal
