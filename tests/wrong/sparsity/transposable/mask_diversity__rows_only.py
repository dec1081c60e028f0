"""chapters.sparsity.transposable.mask_diversity: multiplies the choices of the rows and forgets the columns."""


def mask_diversity(n: int, m: int) -> int:
    checked_pattern(n, m)
    return len(list(combinations(range(m), n))) ** m
