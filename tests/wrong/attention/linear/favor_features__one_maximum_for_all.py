"""chapters.attention.linear.favor_features: one maximum over all heads."""


def favor_features(x: np.ndarray, projection: np.ndarray, query: bool, eps: float = 1e-4) -> np.ndarray:
    require_projection(x, projection)
    y = x * x.shape[-1] ** -0.25
    along = y @ projection.T  # [..., T, m]
    largest = along.max(axis=-1 if query else None, keepdims=True)
    half_square = (y * y).sum(axis=-1, keepdims=True) / 2
    return (np.exp(along - half_square - largest) + eps) / math.sqrt(len(projection))
