"""chapters.attention.lsh.lsh_attention: leaves the results in sorted order."""


def lsh_attention(
    qk: np.ndarray,
    v: np.ndarray,
    buckets: np.ndarray,
    chunk: int = CHUNK,
    causal: bool = True,
    across: bool = True,
    dedup: bool = False,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    scale = checked_scale(qk, v, scale)
    require_buckets(buckets, chunk)
    if (*buckets.shape[:-2], buckets.shape[-1]) != qk.shape[:-1]:
        raise ValueError(f"buckets must be [..., R, T] to fit qk {qk.shape}, got {buckets.shape}")
    counts = times_seen(buckets, chunk, causal, across) if dedup else None
    outs = np.empty_like(qk, shape=(buckets.shape[-2], *qk.shape))  # [R, ..., T, D]
    lses = np.empty_like(outs[..., 0])
    for r, rows, columns, visible in chunk_pairs(buckets, chunk, causal, across):
        scores = shared_scores(qk, rows, columns, scale)
        if counts is not None:
            repeats = np.take_along_axis(counts, rows[..., None], axis=-2)  # [..., m, T]
            repeats = np.take_along_axis(repeats, columns[..., None, :], axis=-1)
            scores = scores - np.log(np.maximum(repeats, 1)).astype(qk.dtype)
        out, lse = attend_visible(scores, visible, np.take_along_axis(v, columns[..., None], axis=-2))
        np.put_along_axis(outs[r], np.sort(rows)[..., None], out, axis=-2)
        np.put_along_axis(lses[r], rows, lse, axis=-1)
    return combine(outs, lses)
