"""chapters.quantization.smoothquant.fold: does not look at the norm, whose single number then spreads."""


def fold(
    norm: Sequence[np.ndarray], readers: Sequence[np.ndarray], scale: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if any(part.shape[-1:] != scale.shape for part in readers):
        raise ValueError(f"norm and readers must have {scale.size} channels, as scale has")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"scale must be positive and finite, got {scale.min()} to {scale.max()}")
    return [vector / scale for vector in norm], [weight * scale for weight in readers]
