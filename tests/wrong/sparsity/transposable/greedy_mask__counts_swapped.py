"""chapters.sparsity.transposable.greedy_mask: looks up the columns' counts by the row and the rows' by the column, as the released code does."""


def greedy_mask(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    checked_pattern(n, m)
    blocks = to_blocks(weight, m)
    each, mask = np.arange(len(blocks)), np.zeros(blocks.shape, dtype=bool)
    rows, columns = np.zeros((2, len(blocks), m), dtype=int)
    for place in np.argsort(-blocks, axis=1, kind="stable").T:
        row, column = place // m, place % m
        fits = (columns[each, row] < n) & (rows[each, column] < n)
        mask[each, place] = fits
        rows[each, row] += fits
        columns[each, column] += fits
    return from_blocks(mask, weight.shape, m)
