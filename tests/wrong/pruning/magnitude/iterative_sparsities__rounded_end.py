"""chapters.pruning.magnitude.iterative_sparsities: computes the last one like the others, so that it is not `final` to the last bit."""


def iterative_sparsities(final: float, rounds: int) -> list[float]:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    kept = 1 - checked_sparsity(final)
    return [1 - kept ** (r / rounds) for r in range(1, rounds + 1)]
