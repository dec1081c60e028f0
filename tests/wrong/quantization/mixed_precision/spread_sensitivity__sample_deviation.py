"""chapters.quantization.mixed_precision.spread_sensitivity: divides by one shard less."""


def spread_sensitivity(eigenvalues: np.ndarray) -> np.ndarray:
    return np.abs(eigenvalues.mean(axis=0)) + eigenvalues.std(axis=0, ddof=min(1, len(eigenvalues) - 1))
