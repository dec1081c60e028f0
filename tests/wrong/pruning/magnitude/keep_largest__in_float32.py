"""chapters.pruning.magnitude.keep_largest: compares in float32, where large numbers are infinite and small ones zero."""


def keep_largest(weight: np.ndarray, kept: int) -> np.ndarray:
    magnitude = magnitudes(weight).astype(np.float32)
    if not 0 <= kept <= weight.size:
        raise ValueError(f"kept must be from 0 to the {weight.size} weights, got {kept}")
    order = np.argsort(-magnitude, axis=None, kind="stable")
    mask = np.zeros(weight.size, dtype=bool)
    mask[order[:kept]] = True
    return mask.reshape(weight.shape)
