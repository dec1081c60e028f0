"""chapters.attention.flash.flash_attention_backward: the scale is in the scores, but not in their gradient."""


def flash_attention_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scale = checked_scale(q, k, v, scale, block_q=block_q, block_k=block_k)
    queries, keys, values = group_heads(q, k, v)
    dout, out, lse = dout.reshape(queries.shape), out.reshape(queries.shape), finite(lse).reshape(queries.shape[:-1])
    delta = (dout * out).sum(axis=-1)
    dq, dk, dv = np.zeros_like(queries), np.zeros_like(keys), np.zeros_like(values)
    for rows in tiles(q.shape[2], block_q):
        for columns in key_tiles(rows, q.shape[2], k.shape[2], block_k, causal):
            scores = tile_scores(queries, keys, rows, columns, causal, scale)
            weights = np.exp(scores - lse[..., rows, None])
            dweights = dout[..., rows, :] @ values[..., columns, :].swapaxes(-1, -2)
            dscores = weights * (dweights - delta[..., rows, None])
            dq[..., rows, :] += dscores @ keys[..., columns, :]
            dk[..., columns, :] += (dscores.swapaxes(-1, -2) @ queries[..., rows, :]).sum(axis=2, keepdims=True)
            dv[..., columns, :] += (weights.swapaxes(-1, -2) @ dout[..., rows, :]).sum(axis=2, keepdims=True)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
