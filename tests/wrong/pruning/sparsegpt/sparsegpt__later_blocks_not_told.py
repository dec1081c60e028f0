"""chapters.pruning.sparsegpt.sparsegpt: leaves the later blocks as they are."""


def sparsegpt(
    weight: np.ndarray, hessian: np.ndarray, sparsity: float = 0.5, pattern: tuple[int, int] | None = None,
    bits: int | None = None, exact: bool = False, damping: float = 0.01, block_size: int = 128,
) -> Pruned:  # fmt: skip
    weight, columns = checked(weight, 8 if bits is None else bits, None)
    checked_sizes(columns, sparsity, pattern, block_size)
    grid = None if bits is None else (*find_grid(weight, bits), bits)
    rest, upper = prepared(weight, hessian, damping)
    solved, mask, total = np.zeros_like(rest), np.zeros(rest.shape, bool), 0.0
    for start in range(0, columns, block_size):
        block = slice(start, start + block_size)
        part, factor = rest[:, block], upper[block, block]
        keep = None if pattern else threshold_mask(part**2 / np.diag(factor) ** 2, sparsity, exact)
        solved[:, block], errors, mask[:, block] = solve_block(part, factor, keep, pattern, grid)
        total += (errors**2).sum() / 2
    return Pruned(solved, mask, float(total))
