"""chapters.sparsity.permutation.efficacy: takes small gains for none."""


def efficacy(weight: np.ndarray, order: np.ndarray) -> float:
    before, half = kept_magnitude(weight), weight.shape[1] // 2
    limit = float(np.sort(magnitudes(weight), axis=1)[:, half:].sum())
    if limit - before <= 1e-6 * limit:
        return 0.0
    return 100 * (kept_magnitude(weight[:, order]) - before) / (limit - before)
