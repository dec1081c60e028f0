"""chapters.quantization.smoothquant.absmax_scale: takes the maximum of every column."""


def absmax_scale(x: np.ndarray, per_row: bool) -> np.ndarray:
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x must be a non-empty [rows, columns] matrix, got shape {x.shape}")
    x = x.astype(np.promote_types(x.dtype, np.float32))
    absmax = np.abs(x).max(axis=0) if per_row else np.abs(x).max(keepdims=True)[0]
    if not np.isfinite(absmax).all():
        raise ValueError("x must be finite")
    return np.maximum(absmax, x.dtype.type(LEAST)) / x.dtype.type(127)
