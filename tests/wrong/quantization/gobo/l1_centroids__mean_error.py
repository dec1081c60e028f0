"""chapters.quantization.gobo.l1_centroids: divides the errors by the number of values."""


def l1_centroids(values: np.ndarray, bits: int) -> Fit:
    path = moves(np.sort(values), equal_shares(values, bits))
    best, least = next(path)
    errors = [least]
    for centroids, error in path:
        errors.append(error)
        if error >= least:
            break
        best, least = centroids, error
    return best, [error / len(values) for error in errors]
