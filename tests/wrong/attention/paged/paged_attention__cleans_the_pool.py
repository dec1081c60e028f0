"""chapters.attention.paged.paged_attention: writes zeros over whatever is no number in the blocks."""


def paged_attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tables: np.ndarray,
    lengths: np.ndarray,
    scale: float | None = None,
    new: np.ndarray | None = None,
) -> np.ndarray:
    new = np.ones(len(lengths), int) if new is None else new
    require_fitting(q, keys, values, tables, lengths, new)
    np.nan_to_num(keys, copy=False), np.nan_to_num(values, copy=False)
    (_, H, D), (_, size, Hkv, _) = q.shape, keys.shape
    out, scale = np.empty(q.shape), 1 / np.sqrt(D) if scale is None else scale
    for table, length, count, end in zip(tables, lengths, new, np.cumsum(new), strict=True):
        used = table[: -(-length // size)]
        k, v = (pool[used].reshape(-1, Hkv, D)[:length].astype(np.float64) for pool in (keys, values))  # [S, Hkv, D]
        queries = q[end - count : end].reshape(count, Hkv, H // Hkv, D)
        scores = scale * np.einsum("thgd,shd->hgts", queries, k)
        hidden = np.arange(length) > np.arange(length - count, length)[:, None]
        scores = np.where(hidden, -np.inf, scores)  # each query sees itself: the maximum is finite
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[end - count : end] = np.einsum("hgts,shd->thgd", weights, v).reshape(count, H, D)
    return out
