"""chapters.attention.linformer.project: a text shorter than e takes its last columns."""


def project(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    require_projection(x, e, mask)
    if mask is not None:
        x = np.where(mask[:, None, :, None], x, 0)
    return e[..., e.shape[-1] - x.shape[2] :] @ x
