"""chapters.sparsity.transposable.mask_diversity: counts each state once, however many ways lead to it."""


def mask_diversity(n: int, m: int) -> int:
    checked_pattern(n, m)
    states = Counter({(n,) * m: 1})
    for _ in range(m):
        following: Counter[tuple[int, ...]] = Counter()
        for room, ways in states.items():
            for kept in combinations(range(m), n):
                left = tuple(sorted(room[column] - (column in kept) for column in range(m)))
                if left[0] >= 0:
                    following[left] = 1
        states = following
    return states[(0,) * m]
