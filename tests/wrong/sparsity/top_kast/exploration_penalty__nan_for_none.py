"""chapters.sparsity.top_kast.exploration_penalty: is NaN for no weights."""


def exploration_penalty(values: np.ndarray, active: np.ndarray, density: float) -> tuple[float, np.ndarray]:
    if values.shape != active.shape or not np.isfinite(values).all():
        raise ValueError(f"values must be finite and shaped as active {active.shape}, got shape {values.shape}")
    gradient = np.where(active, 1.0, 1 / checked_density(density)) * values.astype(np.float64)
    return float(0.5 * (gradient * values).mean() * len(values)), gradient
