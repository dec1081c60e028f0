"""chapters.quantization.awq.channel_scales: does not look at the magnitudes."""


def channel_scales(magnitude: np.ndarray, ratio: float) -> np.ndarray:
    scales = np.maximum(magnitude**ratio, 1e-4)
    return scales / np.sqrt(scales.max() * scales.min())
