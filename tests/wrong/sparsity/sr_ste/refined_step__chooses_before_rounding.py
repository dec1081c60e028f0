"""chapters.sparsity.sr_ste.refined_step: chooses before the new weight is rounded."""


def refined_step(
    weight: np.ndarray, gradient: np.ndarray, n: int = 2, m: int = 4, rate: float = 0.1, decay: float = 2e-4
) -> tuple[np.ndarray, np.ndarray]:
    checked_step(weight, gradient, rate=rate, decay=decay)
    wide = np.result_type(weight, gradient, np.float32)
    change = refined_gradient(weight.astype(wide), gradient.astype(wide), n, m, decay)
    exact = weight.astype(wide) - rate * change
    moved = exact.astype(weight.dtype)
    return moved, np.where(sparse_mask(exact, n, m), moved, 0).astype(gradient.dtype)
