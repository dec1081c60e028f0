"""chapters.sparsity.sr_ste.sparse_mask: compares in float32."""


def sparse_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    return n_m_mask(weight[:, ::-1].astype(np.float32), n, m)[:, ::-1].copy()
