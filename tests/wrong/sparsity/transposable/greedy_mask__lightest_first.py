"""chapters.sparsity.transposable.greedy_mask: takes the lightest first."""


def greedy_mask(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    checked_pattern(n, m)
    blocks = to_blocks(weight, m)
    each, mask = np.arange(len(blocks)), np.zeros(blocks.shape, dtype=bool)
    rows, columns = np.zeros((2, len(blocks), m), dtype=int)
    for place in np.argsort(blocks, axis=1, kind="stable").T:
        row, column = place // m, place % m
        fits = (rows[each, row] < n) & (columns[each, column] < n)
        mask[each, place] = fits
        rows[each, row] += fits
        columns[each, column] += fits
    return from_blocks(mask, weight.shape, m)
