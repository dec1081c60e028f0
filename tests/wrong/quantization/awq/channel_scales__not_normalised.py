"""chapters.quantization.awq.channel_scales: leaves the scales as they come."""


def channel_scales(magnitude: np.ndarray, ratio: float) -> np.ndarray:
    if not ((magnitude >= 0) & np.isfinite(magnitude)).all():
        raise ValueError("magnitude must be finite and not negative")
    scales = np.maximum(magnitude**ratio, 1e-4)
    return scales
