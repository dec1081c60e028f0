"""chapters.pruning.wanda.variant_mask: returns the mask of the last alpha but one."""


def variant_mask(score: np.ndarray, sparsity: float) -> np.ndarray:
    checked_sparsity(sparsity)
    low, alpha, high = 0.0, 0.4, 0.8
    mask = cut_mask(score, alpha)
    while abs((zeros := 1 - mask.mean()) - sparsity) > NEAR and high - low >= NEAR:
        low, high = (low, alpha) if zeros > sparsity else (alpha, high)
        alpha, last = (low + high) / 2, mask
        mask = cut_mask(score, alpha)
        if high - low < NEAR:
            return last
    return mask
