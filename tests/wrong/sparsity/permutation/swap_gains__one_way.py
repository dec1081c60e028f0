"""chapters.sparsity.permutation.swap_gains: counts only the stripe that a column joins, not the one that it leaves."""


def swap_gains(weight: np.ndarray) -> np.ndarray:
    columns = by_column(weight)
    met = meetings(runners_up(columns), columns)
    own, stripe = np.diag(met), np.arange(len(met)) // 4
    gains = met - own[:, None]
    return np.where(stripe == stripe[:, None], 0, gains)
