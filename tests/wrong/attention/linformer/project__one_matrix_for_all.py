"""chapters.attention.linformer.project: every head is projected by the matrix of the first."""


def project(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    require_projection(x, e, mask)
    if mask is not None:
        x = np.where(mask[:, None, :, None], x, 0)
    e = e[0] if e.ndim == 3 else e
    return e[..., : x.shape[2]] @ x
