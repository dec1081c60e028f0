"""chapters.attention.heads.pool_heads: sums in the dtype of the weights, which overflows."""


def pool_heads(weight: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    group = heads_per_group(heads, kv_heads)
    kind = "finite" if np.isfinite(weight).all() else "not finite"
    if weight.ndim != 2 or weight.shape[0] % heads or kind != "finite":
        raise ValueError(f"weight must be finite, [{heads} · D, C]; got {weight.shape}, {kind}")
    parts = weight.reshape(kv_heads, group, -1)  # [kv_heads, group, D C]
    return (parts.sum(axis=1, dtype=weight.dtype) / weight.dtype.type(group)).reshape(-1, weight.shape[1]).astype(weight.dtype)
