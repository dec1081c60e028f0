"""chapters.sparsity.top_kast.exploration_penalty: takes magnitudes, as the formula is printed."""


def exploration_penalty(values: np.ndarray, active: np.ndarray, density: float) -> tuple[float, np.ndarray]:
    if values.shape != active.shape or not np.isfinite(values).all():
        raise ValueError("values must be finite and shaped as active")
    scale = np.where(active, 1.0, 1 / checked_density(density))
    return float((scale * np.abs(values.astype(np.float64))).sum()), scale * np.sign(values.astype(np.float64))
