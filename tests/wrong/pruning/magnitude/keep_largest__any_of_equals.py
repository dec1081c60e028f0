"""chapters.pruning.magnitude.keep_largest: partitions, which keeps any of equals, not the first."""


def keep_largest(weight: np.ndarray, kept: int) -> np.ndarray:
    magnitude = magnitudes(weight)
    if not 0 <= kept <= weight.size:
        raise ValueError(f"kept must be from 0 to the {weight.size} weights, got {kept}")
    mask = np.zeros(weight.size, dtype=bool)
    if kept:
        mask[np.argpartition(-magnitude.ravel(), kept - 1)[:kept]] = True
    return mask.reshape(weight.shape)
