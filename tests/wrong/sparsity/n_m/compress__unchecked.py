"""chapters.sparsity.n_m.compress: drops the third and fourth non-zero of a group without a word."""


def compress(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = magnitudes(weight).shape
    word, groups_per_word = word_layout(weight.dtype)
    if columns % (4 * groups_per_word):
        raise ValueError(f"weight has {columns} columns, not divisible by the {4 * groups_per_word} of a metadata word")
    groups = weight.reshape(rows, -1, 4)
    nonzero = groups != 0
    at0, at1, _, at3 = np.moveaxis(nonzero, -1, 0)
    lower = np.select([at0, at1], [0, 1], 2)
    higher = np.select([at0 & at1, at3 | (lower == 2)], [1, 3], 2)
    values = np.take_along_axis(groups, np.stack((lower, higher), axis=-1), axis=-1)
    nibbles = (lower | higher << 2).reshape(rows, -1, groups_per_word)
    metadata = (nibbles << 4 * np.arange(groups_per_word)).sum(axis=-1)
    return values.reshape(rows, -1), metadata.astype(word)
