"""chapters.quantization.gobo.outlier_mask: fits a Gaussian to every row."""


def outlier_mask(weight: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    if np.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold}")
    weight = np.asarray(weight, dtype=np.float64)
    deviation = weight.std(axis=-1, keepdims=True)
    if (deviation == 0).all():
        return np.zeros(weight.shape, dtype=bool)
    z = (weight - weight.mean(axis=-1, keepdims=True)) / deviation
    return -np.log(deviation * np.sqrt(2 * np.pi)) - z**2 / 2 <= threshold
