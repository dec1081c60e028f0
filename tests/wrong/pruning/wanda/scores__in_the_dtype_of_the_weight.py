"""chapters.pruning.wanda.scores: multiplies in the dtype of the weight."""


def scores(weight: np.ndarray, norms: np.ndarray) -> np.ndarray:
    if weight.ndim != 2 or weight.size == 0 or norms.shape != weight.shape[1:]:
        raise ValueError("weight must be [out, in], norms [in]")
    if not (np.isfinite(weight).all() and np.isfinite(norms).all() and (norms >= 0).all()):
        raise ValueError("weight and norms must be finite, norms not negative")
    wide = weight.dtype if weight.dtype.kind == "f" else np.result_type(weight, norms)
    found = np.abs(weight.astype(wide)) * norms.astype(wide)
    if not np.isfinite(found).all():
        raise ValueError("products must be finite")
    return found
