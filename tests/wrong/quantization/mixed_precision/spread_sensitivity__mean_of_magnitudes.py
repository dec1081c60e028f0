"""chapters.quantization.mixed_precision.spread_sensitivity: takes magnitudes before the mean."""


def spread_sensitivity(eigenvalues: np.ndarray) -> np.ndarray:
    return np.abs(eigenvalues).mean(axis=0) + eigenvalues.std(axis=0)
