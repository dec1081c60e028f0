"""chapters.sparsity.n_m.cutlass_offsets: takes strips of 32 rows for int32 words too."""


def cutlass_offsets(metadata: np.ndarray) -> np.ndarray:
    rows, words = metadata.shape
    strip = 32
    if rows % strip or words % 2:
        raise ValueError(f"CUTLASS's order needs rows divisible by {strip} and even words, got {rows} and {words}")
    row, column = np.indices((rows, words))
    row = row // strip * strip + row % 8 * (strip // 8) + row % strip // 8
    off_diagonal = (row ^ column) & 1
    row, column = row ^ off_diagonal, column ^ off_diagonal
    return column // 2 * 2 * rows + row * 2 + column % 2
