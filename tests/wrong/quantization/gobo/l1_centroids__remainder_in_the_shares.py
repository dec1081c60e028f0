"""chapters.quantization.gobo.l1_centroids: spreads the remainder over the shares."""


def l1_centroids(values: np.ndarray, bits: int) -> Fit:
    path = moves(np.sort(values), np.array([share.mean() for share in np.array_split(np.sort(values), 2**bits)]))
    best, least = next(path)
    errors = [least]
    for centroids, error in path:
        errors.append(error)
        if error >= least:
            break
        best, least = centroids, error
    return best, errors
