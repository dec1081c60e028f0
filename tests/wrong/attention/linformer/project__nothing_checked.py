"""chapters.attention.linformer.project: takes whatever it is given."""


def project(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    if mask is not None:
        x = np.where(mask[:, None, :, None], x, 0)
    return e[..., : x.shape[2]] @ x
