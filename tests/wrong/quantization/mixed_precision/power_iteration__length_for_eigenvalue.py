"""chapters.quantization.mixed_precision.power_iteration: returns the length of H v, which has no sign."""


def power_iteration(
    product: Product, start: np.ndarray, known: Sequence[np.ndarray] = (), tolerance: float = 1e-3, limit: int = 10_000
) -> tuple[float, np.ndarray, float]:
    turned = without(start, known)
    if limit < 1 or not 0 < np.linalg.norm(turned) < np.inf:
        raise ValueError(f"need limit >= 1, and a start that is finite and not zero beside known; got {limit=}")
    v, value, residual = turned, 0.0, np.inf
    for _ in range(limit):
        v = turned / np.linalg.norm(turned)
        turned = without(product(v), known)
        length = float(np.linalg.norm(turned))
        if not np.isfinite(length):
            raise ValueError("product gave numbers that are not finite")
        value = length
        residual = float(np.linalg.norm(turned - value * v)) / length if length else 0.0
        if residual <= tolerance:
            break
    return value, v, residual
