"""chapters.moe.experts.combine: divides by the sum of the weights."""


def combine(y: np.ndarray, order: np.ndarray, weight: np.ndarray) -> np.ndarray:
    tokens, k = weight.shape
    if y.ndim != 2 or len(y) != tokens * k or order.shape != (tokens * k,):
        raise ValueError(f"y and order must have {tokens} · {k} rows, got shapes {y.shape} and {order.shape}")
    chosen = np.empty_like(y)
    chosen[order] = y
    chosen = chosen.reshape(tokens, k, y.shape[1])
    out = np.zeros((tokens, y.shape[1]), y.dtype)
    for j in range(k):
        counts = weight[:, j] != 0
        out[counts] += weight[counts, j, None].astype(y.dtype) * chosen[counts, j]
    total = weight.sum(axis=1, keepdims=True)
    return (out / np.where(total > 0, total, 1)).astype(y.dtype)
