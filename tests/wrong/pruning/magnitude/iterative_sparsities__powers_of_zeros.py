"""chapters.pruning.magnitude.iterative_sparsities: takes roots of the share that goes, not of the share that stays."""


def iterative_sparsities(final: float, rounds: int) -> list[float]:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    kept = 1 - checked_sparsity(final)
    return [final ** (rounds / r) for r in range(1, rounds)] + [final]
