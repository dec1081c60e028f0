"""chapters.pruning.magnitude.iterative_sparsities: begins with 0 and so leaves out the last round."""


def iterative_sparsities(final: float, rounds: int) -> list[float]:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    kept = 1 - checked_sparsity(final)
    return [1 - kept ** (r / rounds) for r in range(rounds)]
