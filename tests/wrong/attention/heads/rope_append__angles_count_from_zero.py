"""chapters.attention.heads.rope_append: the angles are those of the place among the new tokens."""


def rope_append(
    qkv: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray, positions: np.ndarray, cos: np.ndarray, sin: np.ndarray,
    layout: str = "half",
) -> np.ndarray:
    B, heads, kv_heads, T, D = append_shape(qkv, k_cache, v_cache, positions, cos, sin)
    rows = qkv.reshape(B, T, heads + 2 * kv_heads, D)
    at = positions[:, None] + np.arange(T)  # [B, T]
    turned = rotate(rows[:, :, : heads + kv_heads], cos[:T, None], sin[:T, None], layout)
    sequence = np.arange(B)[:, None]
    k_cache[sequence, :, at] = turned[:, :, heads:]  # [B, T, Hkv, D]
    v_cache[sequence, :, at] = rows[:, :, heads + kv_heads :]
    return np.ascontiguousarray(turned[:, :, :heads].swapaxes(1, 2))
