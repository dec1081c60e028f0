"""chapters.sparsity.sr_ste.refined_gradient: the sign of the surveys: what is dropped grows."""


def refined_gradient(
    weight: np.ndarray, gradient: np.ndarray, n: int = 2, m: int = 4, decay: float = 2e-4
) -> np.ndarray:
    checked_step(weight, gradient, decay=decay)
    wide = np.result_type(weight, gradient, np.float32)
    dropped = np.where(sparse_mask(weight, n, m), 0, weight.astype(wide))
    return (gradient.astype(wide) - decay * dropped).astype(weight.dtype)
