"""chapters.attention.patterns.random_blocks: takes the first free ones."""


def random_blocks(taken: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    at_least(0, count=count)
    if taken.ndim != 2 or taken.dtype != bool:
        raise ValueError(f"taken must be a bool matrix, got shape {taken.shape} of {taken.dtype}")
    drawn = np.zeros_like(taken)
    for row, free in enumerate(map(np.flatnonzero, ~taken)):
        drawn[row, free[:count]] = True
    return drawn
