"""chapters.attention.linear.chunked_attention: makes all weights at once."""


def chunked_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, chunk: int = CHUNK, eps: float = EPS
) -> tuple[np.ndarray, np.ndarray]:
    require_square(q, k, v, eps, chunk)
    out, total = np.empty_like(q, shape=v.shape), np.empty_like(q[..., 0])
    chunk, (S, z) = q.shape[-2], empty_state(k, v)
    for start in range(0, q.shape[-2], chunk):
        rows = slice(start, start + chunk)
        queries, keys, values = q[..., rows, :], k[..., rows, :], v[..., rows, :]
        weights = np.tril(queries @ keys.swapaxes(-1, -2))
        total[..., rows] = weights.sum(axis=-1) + (queries @ z[..., None])[..., 0] + eps
        out[..., rows, :] = (weights @ values + queries @ S) / total[..., rows, None]
        S, z = S + keys.swapaxes(-1, -2) @ values, z + keys.sum(axis=-2)
    return out, total
