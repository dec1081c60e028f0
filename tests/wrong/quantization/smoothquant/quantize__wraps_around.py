"""chapters.quantization.smoothquant.quantize: does not clip."""


def quantize(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or scale.shape not in ((1,), x.shape[:1]):
        raise ValueError(f"scale must be [rows] or [1] for x {x.shape}, got {scale.shape}")
    x = x.astype(np.promote_types(x.dtype, np.float32))
    with np.errstate(over="ignore"):  # infinity clips, too
        scale = scale.astype(x.dtype)
        if not (np.isfinite(x).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"x must be finite, and scale positive and finite in {x.dtype}")
        steps = x / scale[:, None]
    return np.rint(steps.clip(-1e9, 1e9)).astype(np.int64).astype(np.int8)
