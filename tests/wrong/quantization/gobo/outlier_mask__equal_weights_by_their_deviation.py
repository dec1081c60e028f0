"""chapters.quantization.gobo.outlier_mask: knows equal weights by a deviation of 0, which rounding spoils."""


def outlier_mask(weight: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    if np.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold}")
    weight = np.asarray(weight, dtype=np.float64)
    deviation = weight.std()
    if deviation == 0:
        return np.zeros(weight.shape, dtype=bool)
    z = (weight - weight.mean()) / deviation
    return -np.log(deviation * np.sqrt(2 * np.pi)) - z**2 / 2 <= threshold
