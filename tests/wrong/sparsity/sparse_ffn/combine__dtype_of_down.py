"""chapters.sparsity.sparse_ffn.combine: returns the dtype of down."""


def combine(hidden: np.ndarray, chosen: np.ndarray, down: np.ndarray) -> np.ndarray:
    if down.ndim != 2 or hidden.shape != chosen.shape:
        raise ValueError(f"hidden must be like chosen, down [F, C], got {hidden.shape}, {chosen.shape}, {down.shape}")
    rows = down[chosen_rows(chosen, len(down))]  # [tokens, blocks, C]
    return np.einsum("tb,tbc->tc", hidden, np.where(hidden[..., None] == 0, 0, rows)).astype(down.dtype)
