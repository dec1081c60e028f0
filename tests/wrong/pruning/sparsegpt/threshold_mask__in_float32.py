"""chapters.pruning.sparsegpt.threshold_mask: compares in float32."""


def threshold_mask(score: np.ndarray, sparsity: float, exact: bool = False) -> np.ndarray:
    checked_sparsity(sparsity)
    if exact:
        return keep_largest(score, score.size - dropped(score.size, sparsity))
    score = score.astype(np.float32)
    return score > np.sort(score, axis=None)[int(sparsity * score.size)]
