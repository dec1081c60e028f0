"""chapters.sparsity.top_kast.sparse_update: corrects moments that are new as in the first step."""


def sparse_update(
    values: np.ndarray, gradient: np.ndarray, active: np.ndarray, mean: np.ndarray, square: np.ndarray,
    step: int, rate: float, decay: float, density: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    shapes = {array.shape for array in (values, gradient, active, mean, square)}
    if len(shapes) != 1 or step < 1:
        raise ValueError(f"arrays must share a shape and step be at least 1, got {sorted(shapes)} and step={step}")
    values, gradient, mean, square = (array.astype(np.float64) for array in (values, gradient, mean, square))
    scale = np.where(active, 1.0, 1 / checked_density(density))
    mean = FIRST * mean + (1 - FIRST) * gradient
    square = SECOND * square + (1 - SECOND) * gradient**2
    step = np.where(square == (1 - SECOND) * gradient**2, 1, step)
    size = np.sqrt(square / (1 - SECOND**step)) + EPSILON
    return values - rate * (mean / (1 - FIRST**step) / size + decay * scale * values), mean, square
