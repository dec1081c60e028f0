"""chapters.quantization.qat.ternary: keeps what equals the bound."""


def ternary(x: np.ndarray, groups: int = 1) -> np.ndarray:
    parts = cut(x, groups)
    size = np.abs(parts).astype(np.float64)
    kept = size >= 0.7 * size.mean(axis=1, keepdims=True)
    a = np.sum(size, axis=1, where=kept) / np.maximum(kept.sum(axis=1), 1)
    return (a[:, None] * np.sign(parts) * kept).astype(parts.dtype).reshape(np.shape(x))
