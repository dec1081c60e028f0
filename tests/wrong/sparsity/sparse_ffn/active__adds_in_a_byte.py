"""chapters.sparsity.sparse_ffn.active: adds the start of the block in the dtype of the choice."""


def active(x: np.ndarray, up: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or up.ndim != 2 or x.shape[1] != up.shape[1] or len(x) != len(chosen):
        raise ValueError(f"x must be [tokens, C] and up [F, C], got {x.shape} and {up.shape} for chosen {chosen.shape}")
    chosen_rows(chosen, len(up))
    blocks = chosen.shape[1]
    starts = np.arange(0, len(up), len(up) // blocks).astype(chosen.dtype)
    rows = starts + chosen
    return np.maximum(np.einsum("tbc,tc->tb", up[rows], x), 0)
