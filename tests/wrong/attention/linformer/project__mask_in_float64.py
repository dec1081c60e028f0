"""chapters.attention.linformer.project: padding makes float64 of everything."""


def project(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    require_projection(x, e, mask)
    if mask is not None:
        x = np.where(mask[:, None, :, None], x, np.zeros(1))
    return e[..., : x.shape[2]] @ x
