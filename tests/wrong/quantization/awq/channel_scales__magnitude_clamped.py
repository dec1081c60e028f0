"""chapters.quantization.awq.channel_scales: bounds the magnitude instead of its power."""


def channel_scales(magnitude: np.ndarray, ratio: float) -> np.ndarray:
    if not ((magnitude >= 0) & np.isfinite(magnitude)).all():
        raise ValueError("magnitude must be finite and not negative")
    scales = np.maximum(magnitude, 1e-4) ** ratio
    return scales / np.sqrt(scales.max() * scales.min())
