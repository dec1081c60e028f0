"""chapters.pruning.sparsegpt.threshold_mask: counts as the book does, the release does not."""


def threshold_mask(score: np.ndarray, sparsity: float, exact: bool = False) -> np.ndarray:
    checked_sparsity(sparsity)
    return keep_largest(score, score.size - dropped(score.size, sparsity))
