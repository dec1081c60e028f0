"""chapters.quantization.gobo.l1_centroids: begins with values at equal distances."""


def l1_centroids(values: np.ndarray, bits: int) -> Fit:
    path = moves(np.sort(values), np.linspace(values.min(), values.max(), 2**bits))
    best, least = next(path)
    errors = [least]
    for centroids, error in path:
        errors.append(error)
        if error >= least:
            break
        best, least = centroids, error
    return best, errors
