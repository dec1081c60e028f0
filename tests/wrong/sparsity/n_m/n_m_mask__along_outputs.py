"""chapters.sparsity.n_m.n_m_mask: groups neighbours along the output axis."""


def n_m_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    magnitude = magnitudes(weight)
    if not 1 <= n <= m:
        raise ValueError(f"need 1 <= n <= m, got n={n}, m={m}")
    if weight.shape[1] % m:
        raise ValueError(f"weight has {weight.shape[1]} columns, not divisible by m={m}")
    groups = magnitude.T.reshape(weight.shape[1] * len(weight) // m, m)
    order = np.argsort(-groups, axis=-1, kind="stable")
    mask = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(mask, order[..., :n], True, axis=-1)
    return mask.reshape(weight.shape[::-1]).T
