"""chapters.pruning.magnitude.keep_largest: takes magnitudes in the dtype of the weight, where |-128| is -128 and -200 of a uint8 wraps."""


def keep_largest(weight: np.ndarray, kept: int) -> np.ndarray:
    magnitudes(weight)
    if not 0 <= kept <= weight.size:
        raise ValueError(f"kept must be from 0 to the {weight.size} weights, got {kept}")
    order = np.argsort(-np.abs(weight), axis=None, kind="stable")
    mask = np.zeros(weight.size, dtype=bool)
    mask[order[:kept]] = True
    return mask.reshape(weight.shape)
