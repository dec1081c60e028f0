"""chapters.quantization.qat.ternary: takes 0.7 of the largest magnitude."""


def ternary(x: np.ndarray, groups: int = 1) -> np.ndarray:
    parts = cut(x, groups)
    size = np.abs(parts).astype(np.float64)
    kept = size > 0.7 * size.max(axis=1, keepdims=True)
    a = np.sum(size, axis=1, where=kept) / np.maximum(kept.sum(axis=1), 1)
    return (a[:, None] * np.sign(parts) * kept).astype(parts.dtype).reshape(np.shape(x))
