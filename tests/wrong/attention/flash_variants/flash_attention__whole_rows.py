"""chapters.attention.flash_variants.flash_attention: holds all scores of a row at once."""


def flash_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True, scale: float | None = None,
    window: Window = (None, None), softcap: float | None = None, slopes: np.ndarray | None = None,
    cu_q: Offsets | None = None, cu_k: Offsets | None = None, block_q: int = 64, block_k: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    plan = checked(q, k, v, causal, scale, window, softcap, slopes, cu_q, cu_k, block_q=block_q, block_k=block_k)
    queries, keys, values = group_heads(q, k, v)
    out, lse = np.empty_like(queries), np.empty_like(queries[..., :1])
    for rows, seen, shift in query_tiles(plan.sequences, plan.left, plan.right, block_q):
        acc = np.zeros_like(queries[..., rows, :])
        total = np.zeros_like(acc[..., :1])
        maximum = np.full_like(total, -np.inf)
        for columns in runs(seen.start, seen.stop, k.shape[2]):
            products = plan.scale * (queries[..., rows, :] @ keys[..., columns, :].swapaxes(-1, -2))
            distance = distances(rows, columns, shift)
            scores = modified_scores(products, distance, plan.left, plan.right, softcap, plan.slopes)
            maximum, total, acc = absorb_tile(maximum, total, acc, scores, values[..., columns, :])
        total = np.where(total > 0, total, 1)
        out[..., rows, :], lse[..., rows, :] = acc / total, maximum + np.log(total)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])
