"""chapters.sparsity.transposable.best_mask: takes the last of equal patterns."""


def best_mask(weight: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    if patterns.ndim != 3 or patterns.shape[1] != patterns.shape[2] or patterns.size == 0:
        raise ValueError(f"patterns must be [P, m, m] and at least one, got shape {patterns.shape}")
    m = patterns.shape[1]
    flat = patterns.reshape(len(patterns), -1)
    chosen = len(flat) - 1 - (to_blocks(weight, m) @ flat[::-1].T).argmax(axis=1)
    return from_blocks(flat[chosen], weight.shape, m)
