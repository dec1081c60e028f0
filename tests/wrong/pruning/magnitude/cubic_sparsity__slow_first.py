"""chapters.pruning.magnitude.cubic_sparsity: takes the power of what is done, not of what is left: slow first, fast last."""


def cubic_sparsity(
    step: float, begin: float, end: float, initial: float, final: float, power: float = 3.0
) -> float:
    if not (begin < end and power > 0 and step == step):
        raise ValueError(f"need begin < end, power > 0 and a step, got {begin=}, {end=}, {power=}, {step=}")
    if checked_sparsity(initial) > checked_sparsity(final):
        raise ValueError(f"need initial <= final, got {initial} and {final}")
    done = min(max((step - begin) / (end - begin), 0), 1)
    return initial + (final - initial) * done**power
