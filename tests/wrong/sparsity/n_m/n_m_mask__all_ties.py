"""chapters.sparsity.n_m.n_m_mask: keeps everything that reaches the n-th magnitude, so ties keep too many."""


def n_m_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    magnitude = magnitudes(weight)
    if not 1 <= n <= m:
        raise ValueError(f"need 1 <= n <= m, got n={n}, m={m}")
    if weight.shape[1] % m:
        raise ValueError(f"weight has {weight.shape[1]} columns, not divisible by m={m}")
    groups = magnitude.reshape(len(weight), -1, m)
    threshold = np.sort(groups, axis=-1)[..., m - n, None]
    return (groups >= threshold).reshape(weight.shape)
