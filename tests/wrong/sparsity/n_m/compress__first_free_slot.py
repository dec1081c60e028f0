"""chapters.sparsity.n_m.compress: points empty slots at the first free position, which is 0 or 1, where torch uses 2 or 3."""


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
    order = np.sort(np.argsort(~nonzero, axis=-1, kind="stable")[..., :2], axis=-1)
    lower, higher = np.moveaxis(order, -1, 0)
    values = np.take_along_axis(groups, np.stack((lower, higher), axis=-1), axis=-1)
    nibbles = (lower | higher << 2).reshape(rows, -1, groups_per_word)
    metadata = (nibbles << 4 * np.arange(groups_per_word)).sum(axis=-1)
    return values.reshape(rows, -1), metadata.astype(word)
