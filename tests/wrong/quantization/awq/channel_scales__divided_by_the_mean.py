"""chapters.quantization.awq.channel_scales: normalises by the mean instead of the middle of the range."""


def channel_scales(magnitude: np.ndarray, ratio: float) -> np.ndarray:
    if not ((magnitude >= 0) & np.isfinite(magnitude)).all():
        raise ValueError("magnitude must be finite and not negative")
    scales = np.maximum(magnitude**ratio, 1e-4)
    return scales / scales.mean()
