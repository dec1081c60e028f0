"""chapters.quantization.kv_cache.decode_attention: takes a scale of 0 for none."""


def decode_attention(q: np.ndarray, keys: Held, values: Held, scale: float | None = None) -> np.ndarray:
    k, v = (read(held, q.shape[-1]) for held in (keys, values))
    if q.shape[2:3] != (1,) or k.shape != v.shape or k.shape[0] != q.shape[0] or q.shape[1] % k.shape[1] or k.size == 0:
        raise ValueError(f"q {q.shape}, keys {k.shape} and values {v.shape} do not fit")
    k, v = (half.repeat(q.shape[1] // half.shape[1], axis=1) for half in (k, v))
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2) * (scale or q.shape[-1] ** -0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v
