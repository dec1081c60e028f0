"""chapters.quantization.gobo.l1_centroids: does not stop when the error rises: this is K-means."""


def l1_centroids(values: np.ndarray, bits: int) -> Fit:
    path = moves(np.sort(values), equal_shares(values, bits))
    best, least = next(path)
    errors = [least]
    for centroids, error in path:
        errors.append(error)
        best, least = centroids, error
    return best, errors
