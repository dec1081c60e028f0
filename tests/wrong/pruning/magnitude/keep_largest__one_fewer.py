"""chapters.pruning.magnitude.keep_largest: keeps what is above the threshold, one fewer than asked for."""


def keep_largest(weight: np.ndarray, kept: int) -> np.ndarray:
    magnitude = magnitudes(weight)
    if not 0 <= kept <= weight.size:
        raise ValueError(f"kept must be from 0 to the {weight.size} weights, got {kept}")
    order = np.argsort(-magnitude, axis=None, kind="stable")
    mask = np.zeros(weight.size, dtype=bool)
    mask[order[: max(kept - 1, 0)]] = True
    return mask.reshape(weight.shape)
