"""chapters.moe.experts.grouped_matmul: returns the dtype of the weight alone."""


def grouped_matmul(
    x: np.ndarray, weight: np.ndarray, offsets: np.ndarray, source: np.ndarray | None = None,
    target: np.ndarray | None = None, scale: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    rows = len(x) if source is None else len(source)
    check_runs(x, weight, offsets, rows)
    source, target = (np.arange(rows) if index is None else index for index in (source, target))
    if source.size and not 0 <= source.min() <= source.max() < len(x):
        raise ValueError(f"source must be rows of x, 0 to {len(x) - 1}, got {source.min()} to {source.max()}")
    if target.shape != (rows,) or (np.sort(target) != np.arange(rows)).any():
        raise ValueError(f"target must list each of the {rows} rows once, got shape {target.shape}")
    if scale is not None and scale.shape != (rows,):
        raise ValueError(f"scale must have one number for each of the {rows} rows, got shape {scale.shape}")
    y = np.zeros((rows, weight.shape[1]), weight.dtype)
    for e, matrix in enumerate(weight):
        run = slice(offsets[e], offsets[e + 1])
        done = x[source[run]] @ matrix.T
        y[target[run]] = done if scale is None else scale[target[run], None] * done
    return y
