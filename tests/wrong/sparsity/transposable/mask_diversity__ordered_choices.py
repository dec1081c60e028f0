"""chapters.sparsity.transposable.mask_diversity: multiplies m! (m - 1)! … (m - n + 1)!, which is right for n = 1 only."""


def mask_diversity(n: int, m: int) -> int:
    checked_pattern(n, m)
    return int(np.prod([np.prod(np.arange(1, m - i + 1)) for i in range(n)]))
