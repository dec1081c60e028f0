"""chapters.quantization.gobo.l1_centroids: returns the centroids of the move that made the error rise."""


def l1_centroids(values: np.ndarray, bits: int) -> Fit:
    path = moves(np.sort(values), equal_shares(values, bits))
    best, least = next(path)
    errors = [least]
    for centroids, error in path:
        errors.append(error)
        best = centroids
        if error >= least:
            break
        best, least = centroids, error
    return best, errors
