"""chapters.pruning.sparsegpt.threshold_mask: numbers scores as they lie in memory."""


def threshold_mask(score: np.ndarray, sparsity: float, exact: bool = False) -> np.ndarray:
    checked_sparsity(sparsity)
    if exact:
        mask = np.zeros(score.size, bool); mask[np.argsort(-score.ravel(order='K'), kind='stable')[: score.size - dropped(score.size, sparsity)]] = True; return mask.reshape(score.shape)
    return score > np.sort(score, axis=None)[int(sparsity * score.size)]
