"""chapters.pruning.sparsegpt.threshold_mask: compares within rows."""


def threshold_mask(score: np.ndarray, sparsity: float, exact: bool = False) -> np.ndarray:
    checked_sparsity(sparsity)
    if exact:
        return keep_largest(score, score.size - dropped(score.size, sparsity))
    return score > np.sort(score, axis=1)[:, [int(sparsity * score.shape[1])]]
