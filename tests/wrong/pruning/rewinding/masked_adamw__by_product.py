"""chapters.pruning.rewinding.masked_adamw: multiplies by the mask: NaN times 0 is NaN."""


def masked_adamw(
    weight: np.ndarray, gradient: np.ndarray, mask: np.ndarray, mean: np.ndarray, square: np.ndarray, step: int,
    rate: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.0,
) -> Moments:  # fmt: skip
    shapes = [x.shape for x in (weight, gradient, mask, mean, square)]
    if len(set(shapes)) > 1:
        raise ValueError(f"weight, gradient, mask, mean and square must have one shape, got {shapes}")
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if not np.isfinite(gradient[mask]).all():
        raise ValueError("gradient must be finite where mask is True, it holds NaN or infinity")
    limited = all(0 <= x < math.inf for x in (rate, weight_decay)) and 0 < eps < math.inf
    if not (limited and step >= 1 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"need step >= 1, betas in [0, 1), finite eps > 0, rate >= 0 and weight_decay >= 0, got "
                         f"{step=}, {betas=}, {eps=}, {rate=}, {weight_decay=}")  # fmt: skip
    weight, gradient, mean, square = ((x * mask).astype(np.float64) for x in (weight, gradient, mean, square))
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    moved = rate * (mean / (1 - betas[0] ** step)) / (np.sqrt(square / (1 - betas[1] ** step)) + eps)
    after = (1 - rate * weight_decay) * weight - moved
    return np.where(mask, after, 0), mean, square
