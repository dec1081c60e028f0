"""chapters.sparsity.sr_ste.refined_gradient: decays what is kept."""


def refined_gradient(
    weight: np.ndarray, gradient: np.ndarray, n: int = 2, m: int = 4, decay: float = 2e-4
) -> np.ndarray:
    checked_step(weight, gradient, decay=decay)
    wide = np.result_type(weight, gradient, np.float32)
    kept = np.where(sparse_mask(weight, n, m), weight.astype(wide), 0)
    return (gradient.astype(wide) + decay * kept).astype(weight.dtype)
