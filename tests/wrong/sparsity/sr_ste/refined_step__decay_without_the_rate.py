"""chapters.sparsity.sr_ste.refined_step: the learning rate does not reach the decay."""


def refined_step(
    weight: np.ndarray, gradient: np.ndarray, n: int = 2, m: int = 4, rate: float = 0.1, decay: float = 2e-4
) -> tuple[np.ndarray, np.ndarray]:
    checked_step(weight, gradient, rate=rate, decay=decay)
    wide = np.result_type(weight, gradient, np.float32)
    change = refined_gradient(weight.astype(wide), rate * gradient.astype(wide), n, m, decay)
    moved = (weight.astype(wide) - change).astype(weight.dtype)
    return moved, sparse_weight(moved, n, m).astype(gradient.dtype)
