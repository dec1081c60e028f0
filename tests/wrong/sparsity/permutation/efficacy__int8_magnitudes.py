"""chapters.sparsity.permutation.efficacy: takes magnitudes in int8, where |-128| is -128."""


def efficacy(weight: np.ndarray, order: np.ndarray) -> float:
    before, half = kept_magnitude(weight), weight.shape[1] // 2
    limit = float(np.sort(np.abs(weight), axis=1)[:, half:].sum())
    if limit - before <= 1e-12 * limit:
        return 0.0
    return 100 * (kept_magnitude(weight[:, order]) - before) / (limit - before)
