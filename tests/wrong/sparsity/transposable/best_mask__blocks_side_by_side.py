"""chapters.sparsity.transposable.best_mask: cuts the weight into runs of m² in a row, not into squares."""


def best_mask(weight: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    if patterns.ndim != 3 or patterns.shape[1] != patterns.shape[2] or patterns.size == 0:
        raise ValueError(f"patterns must be [P, m, m] and at least one, got shape {patterns.shape}")
    m = patterns.shape[1]
    flat = patterns.reshape(len(patterns), -1)
    runs = np.abs(weight.astype(np.float64)).reshape(to_blocks(weight, m).shape)
    return flat[(runs @ flat.T).argmax(axis=1)].reshape(weight.shape)
