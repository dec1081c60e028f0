"""chapters.quantization.gobo.l1_centroids: stops after the first move."""


def l1_centroids(values: np.ndarray, bits: int) -> Fit:
    path = moves(np.sort(values), equal_shares(values, bits))
    best, least = next(path)
    errors = [least]
    for centroids, error in path:
        errors.append(error)
        if error >= least:
            break
        best, least = centroids, error
        break
    return best, errors
