"""chapters.sparsity.sr_ste.sparse_mask: groups neighbours of a column."""


def sparse_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    return n_m_mask(weight.T[:, ::-1], n, m)[:, ::-1].T.copy()
