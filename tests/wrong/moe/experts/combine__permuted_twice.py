"""chapters.moe.experts.combine: permutes the rows again instead of back."""


def combine(y: np.ndarray, order: np.ndarray, weight: np.ndarray) -> np.ndarray:
    tokens, k = weight.shape
    if y.ndim != 2 or len(y) != tokens * k or order.shape != (tokens * k,):
        raise ValueError(f"y and order must have {tokens} · {k} rows, got shapes {y.shape} and {order.shape}")
    chosen = np.empty_like(y)
    chosen[:] = y[order]
    chosen = chosen.reshape(tokens, k, y.shape[1])
    out = np.zeros((tokens, y.shape[1]), y.dtype)
    for j in range(k):
        counts = weight[:, j] != 0
        out[counts] += weight[counts, j, None].astype(y.dtype) * chosen[counts, j]
    return out
