"""chapters.moe.experts.combine: adds in the order of the rows."""


def combine(y: np.ndarray, order: np.ndarray, weight: np.ndarray) -> np.ndarray:
    tokens, k = weight.shape
    if y.ndim != 2 or len(y) != tokens * k or order.shape != (tokens * k,):
        raise ValueError(f"y and order must have {tokens} · {k} rows, got shapes {y.shape} and {order.shape}")
    out = np.zeros((tokens, y.shape[1]), y.dtype)
    for row, number in zip(y, order, strict=True):
        if weight.flat[number] != 0:
            out[number // k] += np.asarray(weight.flat[number], y.dtype) * row
    return out
