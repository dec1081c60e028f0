"""chapters.sparsity.sr_ste.sparse_mask: takes n for the zeros of a group."""


def sparse_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    return n_m_mask(weight[:, ::-1], m - n, m)[:, ::-1].copy()
