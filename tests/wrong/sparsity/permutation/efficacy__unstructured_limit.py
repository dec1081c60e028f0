"""chapters.sparsity.permutation.efficacy: takes the larger half of the whole matrix for the limit, not of each row."""


def efficacy(weight: np.ndarray, order: np.ndarray) -> float:
    before, half = kept_magnitude(weight), weight.shape[1] // 2
    limit = float(np.sort(magnitudes(weight), axis=None)[half * len(weight) :].sum())
    if limit - before <= 1e-12 * limit:
        return 0.0
    return 100 * (kept_magnitude(weight[:, order]) - before) / (limit - before)
