"""chapters.sparsity.permutation.efficacy: takes small weights for such that have nothing to gain."""


def efficacy(weight: np.ndarray, order: np.ndarray) -> float:
    before, half = kept_magnitude(weight), weight.shape[1] // 2
    limit = float(np.sort(magnitudes(weight), axis=1)[:, half:].sum())
    if limit - before <= 1e-12:
        return 0.0
    return 100 * (kept_magnitude(weight[:, order]) - before) / (limit - before)
