"""chapters.sparsity.n_m.block_mask: ranks blocks by their largest weight instead of their sum."""


def block_mask(weight: np.ndarray, sparsity: float, rows: int = 4) -> np.ndarray:
    magnitude = magnitudes(weight)
    if rows < 1 or len(weight) % rows:
        raise ValueError(f"weight has {len(weight)} rows, not divisible by rows={rows}")
    blocks = magnitude.reshape(-1, rows, weight.shape[1]).max(axis=1)
    kept = blocks.size - round(sparsity * blocks.size) if 0 <= sparsity < 1 else 0
    if kept == 0:
        raise ValueError(f"sparsity must be in [0, 1) and keep one of {blocks.size} blocks, got {sparsity}")
    mask = n_m_mask(blocks.reshape(1, -1), kept, blocks.size).reshape(blocks.shape)
    return np.repeat(mask, rows, axis=0)
