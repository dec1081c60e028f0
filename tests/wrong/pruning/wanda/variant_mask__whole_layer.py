"""chapters.pruning.wanda.variant_mask: compares all rows together."""


def variant_mask(score: np.ndarray, sparsity: float) -> np.ndarray:
    checked_sparsity(sparsity)
    low, alpha, high = 0.0, 0.4, 0.8
    mask = cut_mask(score.reshape(1, -1), alpha).reshape(score.shape)
    while abs((zeros := 1 - mask.mean()) - sparsity) > NEAR and high - low >= NEAR:
        low, high = (low, alpha) if zeros > sparsity else (alpha, high)
        alpha = (low + high) / 2
        mask = cut_mask(score.reshape(1, -1), alpha).reshape(score.shape)
    return mask
