"""chapters.attention.flash.flash_attention: is right, but holds all scores at once."""


def flash_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    return attention(q, k, v, causal, checked_scale(q, k, v, scale, block_q=block_q, block_k=block_k))
