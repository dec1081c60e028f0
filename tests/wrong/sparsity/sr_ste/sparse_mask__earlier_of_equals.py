"""chapters.sparsity.sr_ste.sparse_mask: keeps the earlier of equal magnitudes."""


def sparse_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    return n_m_mask(weight, n, m)
