"""chapters.sparsity.n_m.block_mask: rounds halves up, and Python's round does so to even."""


def block_mask(weight: np.ndarray, sparsity: float, rows: int = 4) -> np.ndarray:
    magnitude = magnitudes(weight)
    if rows < 1 or len(weight) % rows:
        raise ValueError(f"weight has {len(weight)} rows, not divisible by rows={rows}")
    blocks = magnitude.reshape(-1, rows, weight.shape[1]).sum(axis=1)
    kept = blocks.size - int(sparsity * blocks.size + 0.5) if 0 <= sparsity < 1 else 0
    if kept == 0:
        raise ValueError(f"sparsity must be in [0, 1) and keep one of {blocks.size} blocks, got {sparsity}")
    mask = n_m_mask(blocks.reshape(1, -1), kept, blocks.size).reshape(blocks.shape)
    return np.repeat(mask, rows, axis=0)
