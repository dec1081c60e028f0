"""chapters.sparsity.n_m.n_m_mask: compares in float32, where 1 and 1 + 1e-12 are equal."""


def n_m_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    magnitude = magnitudes(weight).astype(np.float32)
    if not 1 <= n <= m:
        raise ValueError(f"need 1 <= n <= m, got n={n}, m={m}")
    if weight.shape[1] % m:
        raise ValueError(f"weight has {weight.shape[1]} columns, not divisible by m={m}")
    groups = magnitude.reshape(len(weight), -1, m)
    order = np.argsort(-groups, axis=-1, kind="stable")
    mask = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(mask, order[..., :n], True, axis=-1)
    return mask.reshape(weight.shape)
