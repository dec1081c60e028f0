"""chapters.sparsity.permutation.efficacy: divides by rounding errors where nothing can be gained."""


def efficacy(weight: np.ndarray, order: np.ndarray) -> float:
    before, half = kept_magnitude(weight), weight.shape[1] // 2
    limit = float(np.sort(magnitudes(weight), axis=1)[:, half:].sum())
    if limit == before:
        return 0.0
    return 100 * (kept_magnitude(weight[:, order]) - before) / (limit - before)
