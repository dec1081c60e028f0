"""chapters.attention.linformer.project: writes the zeros of the padding into its argument."""


def project(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    require_projection(x, e, mask)
    if mask is not None:
        x.swapaxes(1, 2)[~mask] = 0
    return e[..., : x.shape[2]] @ x
