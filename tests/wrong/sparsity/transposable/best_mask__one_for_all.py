"""chapters.sparsity.transposable.best_mask: takes the pattern that is best for all blocks together."""


def best_mask(weight: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    if patterns.ndim != 3 or patterns.shape[1] != patterns.shape[2] or patterns.size == 0:
        raise ValueError(f"patterns must be [P, m, m] and at least one, got shape {patterns.shape}")
    m = patterns.shape[1]
    flat = patterns.reshape(len(patterns), -1)
    score = to_blocks(weight, m) @ flat.T
    chosen = np.full(len(score), score.sum(axis=0).argmax())
    return from_blocks(flat[chosen], weight.shape, m)
