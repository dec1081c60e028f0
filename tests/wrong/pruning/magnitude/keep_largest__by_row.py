"""chapters.pruning.magnitude.keep_largest: sorts each row of a matrix and then counts over the flat result."""


def keep_largest(weight: np.ndarray, kept: int) -> np.ndarray:
    magnitude = magnitudes(weight)
    if not 0 <= kept <= weight.size:
        raise ValueError(f"kept must be from 0 to the {weight.size} weights, got {kept}")
    order = np.argsort(-magnitude, axis=-1, kind="stable")
    mask = np.zeros(weight.size, dtype=bool)
    mask[order.ravel()[:kept]] = True
    return mask.reshape(weight.shape)
