"""chapters.sparsity.sparse_ffn.combine: numbers the units j · blocks + b."""


def combine(hidden: np.ndarray, chosen: np.ndarray, down: np.ndarray) -> np.ndarray:
    if down.ndim != 2 or hidden.shape != chosen.shape:
        raise ValueError(f"hidden must be like chosen, down [F, C], got {hidden.shape}, {chosen.shape}, {down.shape}")
    chosen_rows(chosen, len(down))
    rows = down[np.arange(chosen.shape[1]) + chosen.astype(np.int64) * chosen.shape[1]]
    return np.einsum("tb,tbc->tc", hidden, np.where(hidden[..., None] == 0, 0, rows))
