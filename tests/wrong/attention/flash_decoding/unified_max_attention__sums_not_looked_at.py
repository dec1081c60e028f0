"""chapters.attention.flash_decoding.unified_max_attention: a sum that overflows stays."""


def unified_max_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, phi: float, low: float, high: float, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scale, widest = checked_scale(q, k, v, scale), carried_range(q.dtype, k.shape[2])
    if not (abs(phi) <= float(np.finfo(q.dtype).max) and widest[0] <= low < high <= widest[1]):
        raise ValueError(
            f"phi must be finite and low < high within {widest[0]:.1f} and {widest[1]:.1f}, got {phi}, {low} and {high}"
        )
    queries, keys, values = group_heads(q, k, v)
    x = tile_scores(queries, keys, slice(None), slice(None), causal=True, scale=scale) - q.dtype.type(phi)
    strays = ~(np.isneginf(x) | ((low < x) & (x < high))).all(axis=-1)
    weights = np.exp(np.where(strays[..., None], -np.inf, x))  # what strays might overflow, and is not used
    total = weights.sum(axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        acc = weights @ values
    strays = strays.reshape(q.shape[:3])
    total = np.where(total > 0, total, 1)
    empty = np.isneginf(x).all(axis=-1)
    lse = np.where(empty, -np.inf, phi + np.log(total)).astype(q.dtype).reshape(q.shape[:3])
    out = (acc / total[..., None]).reshape(q.shape)
    if strays.any():
        again = attention(q, k, v, True, scale)
        out, lse = np.where(strays[..., None], again[0], out), np.where(strays, again[1], lse)
    return out, lse, strays
