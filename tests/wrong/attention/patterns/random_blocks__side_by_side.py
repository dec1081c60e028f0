"""chapters.attention.patterns.random_blocks: draws blocks that stand side by side: each equally often, but not each choice."""


def random_blocks(taken: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    at_least(0, count=count)
    if taken.ndim != 2 or taken.dtype != bool:
        raise ValueError(f"taken must be a bool matrix, got shape {taken.shape} of {taken.dtype}")
    drawn = np.zeros_like(taken)
    for row, free in enumerate(map(np.flatnonzero, ~taken)):
        generator = np.random.default_rng([seed, row])
        drawn[row, np.roll(free, generator.integers(max(len(free), 1)))[:count]] = True
    return drawn
