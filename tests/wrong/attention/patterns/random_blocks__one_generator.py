"""chapters.attention.patterns.random_blocks: rows share a generator, so that what a row draws hangs on those before it."""


def random_blocks(taken: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    at_least(0, count=count)
    if taken.ndim != 2 or taken.dtype != bool:
        raise ValueError(f"taken must be a bool matrix, got shape {taken.shape} of {taken.dtype}")
    drawn, generator = np.zeros_like(taken), np.random.default_rng(seed)
    for row, free in enumerate(map(np.flatnonzero, ~taken)):
        drawn[row, generator.choice(free, min(count, len(free)), replace=False)] = True
    return drawn
