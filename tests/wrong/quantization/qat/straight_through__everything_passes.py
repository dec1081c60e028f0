"""chapters.quantization.qat.straight_through: has no mask."""


def straight_through(x: np.ndarray, dy: np.ndarray, limit: float = math.inf) -> np.ndarray:
    if np.shape(x) != np.shape(dy) or not limit > 0:
        raise ValueError(f"need x and dy of one shape, limit > 0; got {np.shape(x)}, {np.shape(dy)}, limit {limit}")
    return dy.copy()
