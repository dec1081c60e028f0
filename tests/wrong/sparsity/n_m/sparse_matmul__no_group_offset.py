"""chapters.sparsity.n_m.sparse_matmul: reads every group's activations from the first group."""


def sparse_matmul(x: np.ndarray, values: np.ndarray, metadata: np.ndarray) -> np.ndarray:
    index = positions(values, metadata)
    if x.ndim != 2 or x.shape[1] != 2 * values.shape[1]:
        raise ValueError(f"x must be [tokens, {2 * values.shape[1]}] for this weight, got shape {x.shape}")
    columns = index.reshape(values.shape)
    return np.stack([x[:, column] @ kept for column, kept in zip(columns, values, strict=True)], axis=-1)
