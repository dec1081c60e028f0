"""chapters.sparsity.top_kast.sparse_update: updates the weights of A alone."""


def sparse_update(
    values: np.ndarray, gradient: np.ndarray, active: np.ndarray, mean: np.ndarray, square: np.ndarray,
    step: int, rate: float, decay: float, density: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    shapes = {array.shape for array in (values, gradient, active, mean, square)}
    if len(shapes) != 1 or step < 1:
        raise ValueError("arrays must share a shape and step be at least 1")
    values, gradient, mean, square = (array.astype(np.float64) for array in (values, gradient, mean, square))
    scale = np.where(active, 1.0, 1 / checked_density(density))
    mean = FIRST * mean + (1 - FIRST) * gradient
    square = SECOND * square + (1 - SECOND) * gradient**2
    size = np.sqrt(square / (1 - SECOND**step)) + EPSILON
    return values - rate * active * (mean / (1 - FIRST**step) / size + decay * scale * values), mean, square
