"""chapters.attention.flash.flash_attention: visits the tiles past the diagonal, too."""


def flash_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    scale = checked_scale(q, k, v, scale, block_q=block_q, block_k=block_k)
    queries, keys, values = group_heads(q, k, v)
    T, S = queries.shape[-2], keys.shape[-2]
    out, lse = np.empty_like(queries), np.empty_like(queries[..., :1])
    for rows in tiles(T, block_q):
        acc = np.zeros_like(queries[..., rows, :])
        total = np.zeros_like(acc[..., :1])
        maximum = np.full_like(total, -np.inf)
        for columns in tiles(S, block_k):
            scores = tile_scores(queries, keys, rows, columns, causal, scale)
            maximum, total, acc = absorb_tile(maximum, total, acc, scores, values[..., columns, :])
        total = np.where(total > 0, total, 1)
        out[..., rows, :], lse[..., rows, :] = acc / total, maximum + np.log(total)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])
