"""chapters.sparsity.transposable.mask_diversity: lets columns take one more than n."""


def mask_diversity(n: int, m: int) -> int:
    checked_pattern(n, m)
    states = Counter({(n,) * m: 1})
    for _ in range(m):
        following: Counter[tuple[int, ...]] = Counter()
        for room, ways in states.items():
            for kept in combinations(range(m), n):
                left = tuple(sorted(room[column] - (column in kept) for column in range(m)))
                if left[0] >= -1:
                    following[left] += ways
        states = following
    return sum(states.values())
