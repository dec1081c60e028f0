"""chapters.sparsity.sparse_ffn.active: computes all neurons and multiplies most by 0."""


def active(x: np.ndarray, up: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or up.ndim != 2 or x.shape[1] != up.shape[1] or len(x) != len(chosen):
        raise ValueError(f"x must be [tokens, C] and up [F, C], got {x.shape} and {up.shape} for chosen {chosen.shape}")
    rows = chosen_rows(chosen, len(up))
    mask = np.zeros((len(x), len(up)), x.dtype)
    np.put_along_axis(mask, rows, 1, axis=1)
    return (np.maximum(x @ up.T, 0) * mask).reshape(*chosen.shape, -1).sum(axis=-1)
