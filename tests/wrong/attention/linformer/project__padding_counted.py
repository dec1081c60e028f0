"""chapters.attention.linformer.project: padding is projected like tokens."""


def project(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    require_projection(x, e, mask)
    return e[..., : x.shape[2]] @ x
