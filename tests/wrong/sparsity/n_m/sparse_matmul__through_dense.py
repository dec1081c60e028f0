"""chapters.sparsity.n_m.sparse_matmul: expands the weight first, so that dropped weights are multiplied after all."""


def sparse_matmul(x: np.ndarray, values: np.ndarray, metadata: np.ndarray) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] != 2 * values.shape[1]:
        raise ValueError(f"x must be [tokens, {2 * values.shape[1]}] for this weight, got shape {x.shape}")
    return x @ decompress(values, metadata).T
