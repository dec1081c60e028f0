"""chapters.attention.adaptive_span.span_attention_backward: keys get the gradient of the first query head alone."""


def span_attention_backward(
    dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray, span: np.ndarray,
    ramp: int = RAMP, max_span: int | None = None, scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    max_span, scale = checked_attention(q, k, v, span, max_span, scale)
    if not dout.shape == out.shape == q.shape or lse.shape != q.shape[:3]:
        raise ValueError(f"dout {dout.shape}, out {out.shape} and lse {lse.shape} do not fit q {q.shape}")
    (B, H, T, D), kv_heads = q.shape, k.shape[1]
    queries, dout, out = (x.reshape(B, kv_heads, -1, T, D) for x in (q, dout, out))
    keys, values, soft = k[:, :, None], v[:, :, None], grouped_mask(T, k, span, ramp, max_span)
    scores = scale * (queries @ keys.swapaxes(-1, -2))
    p = np.exp(np.where(soft > 0, scores - lse.reshape(*queries.shape[:-1], 1), -np.inf))
    inner = dout @ values.swapaxes(-1, -2) - (dout * out).sum(axis=-1, keepdims=True)
    dscores = scale * soft * p * inner
    beyond = distances(T, k.shape[2]) >= span.reshape(kv_heads, -1, 1, 1)
    dspan = np.sum(p * inner, axis=(0, 3, 4), where=beyond, dtype=np.float64).reshape(H) / ramp
    dk = (dscores.swapaxes(-1, -2) @ queries)[:, :, 0]
    dv = ((soft * p).swapaxes(-1, -2) @ dout).sum(axis=2)
    dq = (dscores @ keys).reshape(q.shape)
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype), dspan
