"""chapters.quantization.qat.ternary: takes the mean magnitude of all numbers for a."""


def ternary(x: np.ndarray, groups: int = 1) -> np.ndarray:
    parts = cut(x, groups)
    size = np.abs(parts).astype(np.float64)
    kept = size > 0.7 * size.mean(axis=1, keepdims=True)
    a = size.mean(axis=1)
    return (a[:, None] * np.sign(parts) * kept).astype(parts.dtype).reshape(np.shape(x))
