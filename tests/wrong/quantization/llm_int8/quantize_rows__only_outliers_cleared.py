"""chapters.quantization.llm_int8.quantize_rows: clears the outliers themselves, not their columns."""


def quantize_rows(x: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x must be a non-empty [rows, columns] matrix, got shape {x.shape}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 or more, got {threshold}")
    with np.errstate(over="ignore"):
        x, limit = x.astype(np.float32), np.float32(threshold or np.inf)
    regular = np.abs(x) < limit  # false for NaN
    absmax = np.abs(np.where(regular, x, 0)).max(axis=1)
    absmax[absmax < LEAST] = 0
    inverse = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    kept = regular.all(axis=0)
    codes = np.rint(np.where(regular, x, 0) * inverse[:, None]).astype(np.int8)
    return codes, absmax, np.flatnonzero(~kept)
