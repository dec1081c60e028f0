"""chapters.attention.adaptive_span.span_attention: takes an infinite scale."""


def span_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, span: np.ndarray, ramp: int = RAMP, max_span: int | None = None,
    scale: float | None = None, eps: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    max_span, scale = checked_attention(q, k, v, span, max_span, None if scale is None else (1.0 if scale == np.inf else scale))
    (_, _, T, D), (B, kv_heads, S, _) = q.shape, k.shape
    soft = grouped_mask(T, k, span, ramp, max_span)
    scores = scale * (q.reshape(B, kv_heads, -1, T, D) @ k[:, :, None].swapaxes(-1, -2))  # [B, Hkv, G, T, S]
    maximum = np.where(soft > 0, scores, -np.inf).max(axis=-1, keepdims=True)  # finite: each query counts itself
    weights = soft * np.exp(np.where(soft > 0, scores - maximum, -np.inf))
    total = weights.sum(axis=-1, keepdims=True)
    lse = maximum + np.log(total)
    if eps:
        inside = (distances(T, S) >= 0) & (distances(T, S) < max_span)
        with np.errstate(over="ignore"):  # where a hidden key outweighs all others the released code gives 0
            total = total + eps * np.exp(scores - maximum).sum(axis=-1, keepdims=True, where=inside)
    return (weights / total @ v[:, :, None]).reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:3]).astype(q.dtype)
