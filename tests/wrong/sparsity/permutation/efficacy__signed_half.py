"""chapters.sparsity.permutation.efficacy: sorts signed weights for the limit."""


def efficacy(weight: np.ndarray, order: np.ndarray) -> float:
    before, half = kept_magnitude(weight), weight.shape[1] // 2
    limit = float(np.sort(weight.astype(np.float64), axis=1)[:, half:].sum())
    if limit - before <= 1e-12 * limit:
        return 0.0
    return 100 * (kept_magnitude(weight[:, order]) - before) / (limit - before)
