"""chapters.sparsity.sparse_ffn.active: lets one token stand for all."""


def active(x: np.ndarray, up: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or up.ndim != 2 or x.shape[1] != up.shape[1]:
        raise ValueError(f"x must be [tokens, C] and up [F, C], got {x.shape} and {up.shape} for chosen {chosen.shape}")
    rows = chosen_rows(chosen, len(up))
    return np.maximum(np.einsum("tbc,tc->tb", up[rows], x), 0)
