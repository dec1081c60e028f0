"""chapters.attention.linformer.blockwise_attention: subtracts the largest score of all queries: what lies far below vanishes."""


def blockwise_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, e: np.ndarray, f: np.ndarray | None = None, scale: float | None = None
) -> np.ndarray:
    scale, f = checked_scale(q, k, v, scale), e if f is None else f
    require_blocks(q, k, e, f)
    (T, S), (slots, block) = (q.shape[2], k.shape[2]), e.shape[-2:]
    position, key = np.arange(S - T, S)[:, None], np.arange(S)
    own = (key // block == position // block) & (key <= position)
    finished = np.arange(S // block * slots) < position // block * slots
    queries, keys, values = group_heads(
        q, np.concatenate((block_slots(k, e), k), axis=2), np.concatenate((block_slots(v, f), v), axis=2)
    )
    scores = scale * (queries @ keys.swapaxes(-1, -2))
    scores = np.where(np.concatenate((finished, own), axis=1), scores, -np.inf)
    weights = np.exp(scores - scores.max())  # a query sees itself: the maximum is finite
    return (weights @ values / weights.sum(axis=-1, keepdims=True)).reshape(q.shape)
