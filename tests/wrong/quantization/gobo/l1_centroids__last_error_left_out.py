"""chapters.quantization.gobo.l1_centroids: does not report the error of the last move."""


def l1_centroids(values: np.ndarray, bits: int) -> Fit:
    path = moves(np.sort(values), equal_shares(values, bits))
    best, least = next(path)
    errors = [least]
    for centroids, error in path:
        if error >= least:
            break
        errors.append(error)
        best, least = centroids, error
    return best, errors
