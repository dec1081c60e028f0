"""chapters.sparsity.sparse_ffn.active: numbers the units j · blocks + b."""


def active(x: np.ndarray, up: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or up.ndim != 2 or x.shape[1] != up.shape[1] or len(x) != len(chosen):
        raise ValueError(f"x must be [tokens, C] and up [F, C], got {x.shape} and {up.shape} for chosen {chosen.shape}")
    chosen_rows(chosen, len(up))
    rows = np.arange(chosen.shape[1]) + chosen.astype(np.int64) * chosen.shape[1]
    return np.maximum(np.einsum("tbc,tc->tb", up[rows], x), 0)
