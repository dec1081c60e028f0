"""chapters.quantization.mixed_precision.spread_sensitivity: leaves the sign of the mean."""


def spread_sensitivity(eigenvalues: np.ndarray) -> np.ndarray:
    return eigenvalues.mean(axis=0) + eigenvalues.std(axis=0)
