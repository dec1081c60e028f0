"""chapters.pruning.magnitude.iterative_sparsities: equal shares of all weights, not of those that are left."""


def iterative_sparsities(final: float, rounds: int) -> list[float]:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    kept = 1 - checked_sparsity(final)
    return [final * r / rounds for r in range(1, rounds)] + [final]
