"""chapters.quantization.qat.ternary: divides by nothing in a group of zeros."""


def ternary(x: np.ndarray, groups: int = 1) -> np.ndarray:
    parts = cut(x, groups)
    size = np.abs(parts).astype(np.float64)
    kept = size > 0.7 * size.mean(axis=1, keepdims=True)
    a = np.sum(size, axis=1, where=kept) / kept.sum(axis=1)
    return (a[:, None] * np.sign(parts) * kept).astype(parts.dtype).reshape(np.shape(x))
