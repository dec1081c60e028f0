"""chapters.pruning.sparsegpt.threshold_mask: squares the scores once more, so that small ones are equal."""


def threshold_mask(score: np.ndarray, sparsity: float, exact: bool = False) -> np.ndarray:
    checked_sparsity(sparsity)
    if exact:
        return keep_largest(score**2, score.size - dropped(score.size, sparsity))
    return score > np.sort(score, axis=None)[int(sparsity * score.size)]
