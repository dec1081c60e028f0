"""chapters.sparsity.top_kast.exploration_penalty: weighs A by 1 / D instead of the rest."""


def exploration_penalty(values: np.ndarray, active: np.ndarray, density: float) -> tuple[float, np.ndarray]:
    if values.shape != active.shape or not np.isfinite(values).all():
        raise ValueError("values must be finite and shaped as active")
    gradient = np.where(active, 1 / checked_density(density), 1.0) * values.astype(np.float64)
    return float(0.5 * (gradient * values).sum()), gradient
