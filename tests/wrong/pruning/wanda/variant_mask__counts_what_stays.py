"""chapters.pruning.wanda.variant_mask: takes the sparsity for the share that stays."""


def variant_mask(score: np.ndarray, sparsity: float) -> np.ndarray:
    checked_sparsity(sparsity)
    low, alpha, high = 0.0, 0.4, 0.8
    mask = cut_mask(score, alpha)
    while abs((zeros := mask.mean()) - sparsity) > NEAR and high - low >= NEAR:
        low, high = (low, alpha) if zeros > sparsity else (alpha, high)
        alpha = (low + high) / 2
        mask = cut_mask(score, alpha)
    return mask
