"""chapters.sparsity.sr_ste.refined_gradient: dropped weights get no gradient."""


def refined_gradient(
    weight: np.ndarray, gradient: np.ndarray, n: int = 2, m: int = 4, decay: float = 2e-4
) -> np.ndarray:
    checked_step(weight, gradient, decay=decay)
    wide = np.result_type(weight, gradient, np.float32)
    mask = sparse_mask(weight, n, m)
    return np.where(mask, gradient.astype(wide), decay * weight.astype(wide)).astype(weight.dtype)
