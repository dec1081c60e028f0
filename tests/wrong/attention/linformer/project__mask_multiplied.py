"""chapters.attention.linformer.project: multiplies by the mask, and a NaN in the padding stays one."""


def project(x: np.ndarray, e: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    require_projection(x, e, mask)
    if mask is not None:
        x = (x * mask[:, None, :, None]).astype(x.dtype)
    return e[..., : x.shape[2]] @ x
