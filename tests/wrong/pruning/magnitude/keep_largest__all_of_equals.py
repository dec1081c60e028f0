"""chapters.pruning.magnitude.keep_largest: keeps all that reach the threshold, so that equals make too many."""


def keep_largest(weight: np.ndarray, kept: int) -> np.ndarray:
    magnitude = magnitudes(weight)
    if not 0 <= kept <= weight.size:
        raise ValueError(f"kept must be from 0 to the {weight.size} weights, got {kept}")
    if kept == 0:
        return np.zeros(weight.shape, dtype=bool)
    return magnitude >= np.sort(magnitude, axis=None)[weight.size - kept]
