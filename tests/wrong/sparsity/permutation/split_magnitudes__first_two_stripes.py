"""chapters.sparsity.permutation.split_magnitudes: adds only the first two stripes of a split."""


def split_magnitudes(columns: np.ndarray, groups: np.ndarray) -> np.ndarray:
    fours, ways = stripe_choices(4 * groups.shape[1])
    rows = max(BLOCK // len(fours), 1)
    sums = np.zeros((len(groups), len(fours)))
    for group, found in zip(groups, sums, strict=True):
        members = columns.reshape(-1, 4, columns.shape[1])[group].reshape(-1, columns.shape[1])
        for start in range(0, columns.shape[1], rows):
            found += two_largest(*members[fours.T, start : start + rows]).sum(axis=1)
    return np.sum([sums[:, stripe] for stripe in ways.T[:2]], axis=0)
