"""chapters.pruning.magnitude.cubic_sparsity: refuses powers below 1."""


def cubic_sparsity(
    step: float, begin: float, end: float, initial: float, final: float, power: float = 3.0
) -> float:  # fmt: skip
    if not (begin < end and power >= 1 and step == step):
        raise ValueError(f"need begin < end, power >= 1 and a step, got {begin=}, {end=}, {power=}, {step=}")
    if checked_sparsity(initial) > checked_sparsity(final):
        raise ValueError(f"need initial <= final, got {initial} and {final}")
    left = 1 - min(max((step - begin) / (end - begin), 0), 1)
    return final + (initial - final) * left**power
