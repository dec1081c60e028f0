"""chapters.quantization.smoothquant.fold: a scale of ones makes no new arrays."""


def fold(
    norm: Sequence[np.ndarray], readers: Sequence[np.ndarray], scale: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if any(part.shape[-1:] != scale.shape for part in (*norm, *readers)):
        raise ValueError(f"norm and readers must have {scale.size} channels, as scale has")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"scale must be positive and finite, got {scale.min()} to {scale.max()}")
    if (scale == 1).all():
        return list(norm), list(readers)
    return [vector / scale for vector in norm], [weight * scale for weight in readers]
