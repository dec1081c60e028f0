"""chapters.quantization.smoothquant.fold: scales the first layer only."""


def fold(
    norm: Sequence[np.ndarray], readers: Sequence[np.ndarray], scale: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if any(part.shape[-1:] != scale.shape for part in (*norm, *readers)):
        raise ValueError(f"norm and readers must have {scale.size} channels, as scale has")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"scale must be positive and finite, got {scale.min()} to {scale.max()}")
    return [vector / scale for vector in norm], [readers[0] * scale, *readers[1:]]
