"""chapters.quantization.zeroquant.quantize: keeps the least value itself as zero."""


def quantize(
    x: np.ndarray, bits: int, groups: int = 1, symmetric: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = checked(x)
    if bits not in range(2, 9):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    if groups < 1 or x.size % groups:
        raise ValueError(f"groups must divide the {x.size} numbers of x, got {groups}")
    cut, half = x.reshape(groups, -1), 2 ** (bits - 1)
    if symmetric:
        scale = usable(np.abs(cut).max(axis=1) / half)
        codes = np.clip(np.rint(cut / scale[:, None]), -half, half - 1).astype(np.int8)
        return codes.reshape(x.shape), scale, np.zeros_like(scale)
    low, high = cut.min(axis=1), cut.max(axis=1)
    with np.errstate(over="ignore"):
        step = checked((high - low) / (2 * half), "the range of x")
        scale = usable(step)
        zero = low
        codes = np.clip(np.rint((cut - zero[:, None]) / scale[:, None]), 0, 2 * half - 1).astype(np.uint8)
    return codes.reshape(x.shape), scale, zero
