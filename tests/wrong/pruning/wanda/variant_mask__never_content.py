"""chapters.pruning.wanda.variant_mask: halves the interval to the end."""


def variant_mask(score: np.ndarray, sparsity: float) -> np.ndarray:
    checked_sparsity(sparsity)
    low, alpha, high = 0.0, 0.4, 0.8
    mask = cut_mask(score, alpha)
    while high - low >= NEAR:
        low, high = (low, alpha) if 1 - mask.mean() > sparsity else (alpha, high)
        alpha = (low + high) / 2
        mask = cut_mask(score, alpha)
    return mask
