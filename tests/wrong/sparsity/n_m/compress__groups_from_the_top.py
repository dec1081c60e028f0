"""chapters.sparsity.n_m.compress: puts the first group of a word into its highest bits."""


def compress(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = magnitudes(weight).shape
    word, groups_per_word = word_layout(weight.dtype)
    if columns % (4 * groups_per_word):
        raise ValueError(f"weight has {columns} columns, not divisible by the {4 * groups_per_word} of a metadata word")
    groups = weight.reshape(rows, -1, 4)
    nonzero = groups != 0
    if (crowded := nonzero.sum(axis=-1) > 2).any():
        row, group = np.argwhere(crowded)[0]
        raise ValueError(f"weight is not 2:4: row {row}, columns {4 * group} to {4 * group + 3}: {groups[row, group]}")
    at0, at1, _, at3 = np.moveaxis(nonzero, -1, 0)
    lower = np.select([at0, at1], [0, 1], 2)
    higher = np.select([at0 & at1, at3 | (lower == 2)], [1, 3], 2)
    values = np.take_along_axis(groups, np.stack((lower, higher), axis=-1), axis=-1)
    nibbles = (lower | higher << 2).reshape(rows, -1, groups_per_word)
    metadata = (nibbles << 4 * np.arange(groups_per_word)[::-1]).sum(axis=-1)
    return values.reshape(rows, -1), metadata.astype(word)
