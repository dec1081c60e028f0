"""chapters.sparsity.n_m.matmul_n_m: takes positions for columns, so that all groups read the first."""


def matmul_n_m(x: np.ndarray, values: np.ndarray, packed: np.ndarray, n: int, m: int) -> np.ndarray:
    columns = columns_n_m(values, packed, n, m)
    if x.ndim != 2 or x.shape[1] != values.shape[1] // n * m:
        raise ValueError(f"x must be [tokens, {values.shape[1] // n * m}] for this weight, got shape {x.shape}")
    return np.stack([x[:, column % m] @ kept for column, kept in zip(columns, values, strict=True)], axis=-1)
