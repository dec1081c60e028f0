"""chapters.pruning.wanda.variant_mask: searches up to 1, from the middle."""


def variant_mask(score: np.ndarray, sparsity: float) -> np.ndarray:
    checked_sparsity(sparsity)
    low, alpha, high = 0.0, 0.5, 1.0
    mask = cut_mask(score, alpha)
    while abs((zeros := 1 - mask.mean()) - sparsity) > NEAR and high - low >= NEAR:
        low, high = (low, alpha) if zeros > sparsity else (alpha, high)
        alpha = (low + high) / 2
        mask = cut_mask(score, alpha)
    return mask
