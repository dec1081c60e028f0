"""chapters.pruning.magnitude.iterative_sparsities: drops the final share in each round, of what is left."""


def iterative_sparsities(final: float, rounds: int) -> list[float]:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    kept = 1 - checked_sparsity(final)
    return [1 - kept**r for r in range(1, rounds)] + [final]
