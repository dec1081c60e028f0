"""chapters.pruning.sparsegpt.solve_block: writes into the mask that it is given."""


def solve_block(
    weight: np.ndarray, upper: np.ndarray, mask: np.ndarray | None = None, pattern: tuple[int, int] | None = None,
    grid: tuple[np.ndarray, np.ndarray, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    if (mask is None) == (pattern is None):
        raise ValueError("give either mask or pattern")
    rest, solved, errors = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    mask = np.zeros(weight.shape, bool) if mask is None else mask
    for j in range(weight.shape[1]):
        if pattern and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            mask[:, group] = n_m_mask(rest[:, group] ** 2 / np.diag(upper)[group] ** 2, *pattern)
        value = np.where(mask[:, j], rest[:, j], 0)
        if grid is not None:
            value = dequantize(quantize(value, *grid), *grid[:2])
        mask[:, j] &= value != 0
        solved[:, j], errors[:, j] = value, (rest[:, j] - value) / upper[j, j]
        rest[:, j:] -= np.outer(errors[:, j], upper[j, j:])
    return solved, errors, mask
