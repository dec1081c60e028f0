"""chapters.sparsity.permutation.efficacy: divides also where there is nothing to gain."""


def efficacy(weight: np.ndarray, order: np.ndarray) -> float:
    before, half = kept_magnitude(weight), weight.shape[1] // 2
    limit = float(np.sort(magnitudes(weight), axis=1)[:, half:].sum())
    return 100 * (kept_magnitude(weight[:, order]) - before) / (limit - before)
