"""chapters.pruning.magnitude.cubic_sparsity: starts from 0, not from `initial`."""


def cubic_sparsity(
    step: float, begin: float, end: float, initial: float, final: float, power: float = 3.0
) -> float:
    if not (begin < end and power > 0 and step == step):
        raise ValueError(f"need begin < end, power > 0 and a step, got {begin=}, {end=}, {power=}, {step=}")
    if checked_sparsity(initial) > checked_sparsity(final):
        raise ValueError(f"need initial <= final, got {initial} and {final}")
    left = 1 - min(max((step - begin) / (end - begin), 0), 1)
    return final - final * left**power
