"""chapters.sparsity.transposable.transposable_patterns: lets columns hold one more than n."""


def transposable_patterns(n: int, m: int) -> np.ndarray:
    checked_pattern(n, m)
    if m > ENUMERATED:
        raise ValueError(f"m must be at most {ENUMERATED} for all masks to be listed, got {m}")
    rows = [np.isin(np.arange(m), kept) for kept in combinations(range(m), n)]
    found = np.zeros((1, 0, m), dtype=bool)
    for _ in range(m):
        longer = np.stack([np.concatenate((mask, [row])) for mask in found for row in rows])
        found = longer[(longer.sum(axis=1) <= n + 1).all(axis=1)]
    return found
