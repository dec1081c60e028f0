"""chapters.pruning.magnitude.keep_largest: sorts upwards and takes the end, so that the last of equals stay."""


def keep_largest(weight: np.ndarray, kept: int) -> np.ndarray:
    magnitude = magnitudes(weight)
    if not 0 <= kept <= weight.size:
        raise ValueError(f"kept must be from 0 to the {weight.size} weights, got {kept}")
    order = np.argsort(magnitude, axis=None, kind="stable")
    mask = np.zeros(weight.size, dtype=bool)
    mask[order[weight.size - kept :]] = True
    return mask.reshape(weight.shape)
