"""chapters.attention.heads.grouped_attention: subtracts the largest score of all rows: what lies far below vanishes."""


def grouped_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True, scale: float | None = None
) -> np.ndarray:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"need q [B, H, T, D], k and v [B, Hkv, S, D]; got {q.shape}, {k.shape} and {v.shape}")
    (B, H, T, D), (_, kv_heads, S, _) = q.shape, k.shape
    if S < (T if causal else 1):
        raise ValueError(f"k must have at least {T if causal else 1} positions, got {S}")
    queries = q.reshape(B, kv_heads, heads_per_group(H, kv_heads), T, D)
    scores = (1 / math.sqrt(D) if scale is None else scale) * (queries @ k[:, :, None].swapaxes(-1, -2))
    if causal:
        scores = np.where(np.arange(S) <= np.arange(T)[:, None] + S - T, scores, -np.inf)  # [B, Hkv, G, T, S]
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum(axis=-1, keepdims=True) @ v[:, :, None]).reshape(q.shape)
