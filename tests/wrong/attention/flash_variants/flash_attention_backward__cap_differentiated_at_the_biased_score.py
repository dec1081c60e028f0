"""chapters.attention.flash_variants.flash_attention_backward: takes 1 − tanh² of the score with its bias."""


def flash_attention_backward(
    dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray,
    causal: bool = True, scale: float | None = None, window: Window = (None, None), softcap: float | None = None,
    slopes: np.ndarray | None = None, cu_q: Offsets | None = None, cu_k: Offsets | None = None, block_q: int = 64,
    block_k: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    plan = checked(q, k, v, causal, scale, window, softcap, slopes, cu_q, cu_k, block_q=block_q, block_k=block_k)
    if not dout.shape == out.shape == q.shape or lse.shape != q.shape[:3]:
        raise ValueError(f"dout {dout.shape}, out {out.shape} and lse {lse.shape} do not fit q {q.shape}")
    queries, keys, values = group_heads(q, k, v)
    dout, out, lse = dout.reshape(queries.shape), out.reshape(queries.shape), finite(lse).reshape(queries.shape[:-1])
    delta = (dout * out).sum(axis=-1)  # [B, Hkv, G, T]
    dq, dk, dv = np.zeros_like(queries), np.zeros_like(keys), np.zeros_like(values)
    for rows, seen, shift in query_tiles(plan.sequences, plan.left, plan.right, block_q):
        for columns in runs(seen.start, seen.stop, block_k):
            products = plan.scale * (queries[..., rows, :] @ keys[..., columns, :].swapaxes(-1, -2))
            distance = distances(rows, columns, shift)
            scores = modified_scores(products, distance, plan.left, plan.right, softcap, plan.slopes)
            weights = np.exp(scores - lse[..., rows, None])
            dweights = dout[..., rows, :] @ values[..., columns, :].swapaxes(-1, -2)
            slope = plan.scale if softcap is None else plan.scale * (1 - np.tanh(np.where(np.isinf(scores), 0, scores) / softcap) ** 2)
            dproducts = slope * weights * (dweights - delta[..., rows, None])
            dq[..., rows, :] += dproducts @ keys[..., columns, :]
            dk[..., columns, :] += (dproducts.swapaxes(-1, -2) @ queries[..., rows, :]).sum(axis=2, keepdims=True)
            dv[..., columns, :] += (weights.swapaxes(-1, -2) @ dout[..., rows, :]).sum(axis=2, keepdims=True)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
