"""chapters.sparsity.sr_ste.sparse_mask: compares values, not magnitudes."""


def sparse_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    n_m_mask(weight, n, m)
    groups = weight.reshape(len(weight), -1, m)
    mask = np.ones(groups.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(groups, axis=-1, kind="stable")[..., : m - n], False, axis=-1)
    return mask.reshape(weight.shape)
