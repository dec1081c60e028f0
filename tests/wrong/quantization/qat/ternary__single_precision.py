"""chapters.quantization.qat.ternary: takes means in the dtype of x."""


def ternary(x: np.ndarray, groups: int = 1) -> np.ndarray:
    parts = cut(x, groups)
    size = np.abs(parts)
    kept = size > 0.7 * size.mean(axis=1, keepdims=True)
    a = np.sum(size, axis=1, where=kept) / np.maximum(kept.sum(axis=1), 1)
    return (a[:, None] * np.sign(parts) * kept).astype(parts.dtype).reshape(np.shape(x))
