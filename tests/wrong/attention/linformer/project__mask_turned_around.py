"""chapters.attention.linformer.project: takes True for padding."""


def project(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    require_projection(x, e, mask)
    if mask is not None:
        x = np.where(mask[:, None, :, None], 0, x)
    return e[..., : x.shape[2]] @ x
