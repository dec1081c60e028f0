"""chapters.pruning.sparsegpt.threshold_mask: counts equal scores down the columns."""


def threshold_mask(score: np.ndarray, sparsity: float, exact: bool = False) -> np.ndarray:
    checked_sparsity(sparsity)
    if exact:
        return keep_largest(score.T, score.size - dropped(score.size, sparsity)).T
    return score > np.sort(score, axis=None)[int(sparsity * score.size)]
