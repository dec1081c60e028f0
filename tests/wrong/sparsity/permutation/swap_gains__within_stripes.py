"""chapters.sparsity.permutation.swap_gains: lets columns of one stripe be swapped, by a formula that does not hold there."""


def swap_gains(weight: np.ndarray) -> np.ndarray:
    columns = by_column(weight)
    met = meetings(runners_up(columns), columns)
    own = np.diag(met)
    gains = met + met.T - own - own[:, None]
    return gains
