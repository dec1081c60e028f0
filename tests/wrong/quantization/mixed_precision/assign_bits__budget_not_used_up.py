"""chapters.quantization.mixed_precision.assign_bits: wants a size below the budget."""


def assign_bits(cost: np.ndarray, sizes: Sequence[int], bits: Sequence[int], budget: int) -> np.ndarray:
    if cost.shape != (len(sizes), len(bits)) or cost.size == 0 or not np.isfinite(cost).all():
        raise ValueError(f"cost must be finite, [{len(sizes)} layers, {len(bits)} choices], got shape {cost.shape}")
    rest = min(bits) * sum(sizes)
    if budget < rest:
        raise ValueError(f"budget must be at least {rest} bits, {min(bits)} a weight, got {budget}")
    frontier: list[tuple] = [(0, 0.0, None)]  # size, cost, (bits of the last layer, those before it)
    for layer, size in enumerate(sizes):
        rest -= min(bits) * size
        grown = [
            (used + size * width, total + cost[layer, choice], (width, before))
            for used, total, before in frontier
            for choice, width in enumerate(bits)
            if used + size * width + rest < budget + (rest == 0 and budget == min(bits) * sum(sizes))
        ]
        frontier, least = [], np.inf
        for candidate in sorted(grown, key=lambda each: each[:2]):
            if candidate[1] < least:
                frontier.append(candidate)
                least = candidate[1]
    chosen, before = [], frontier[-1][2]
    while before:
        chosen.append(before[0])
        before = before[1]
    return np.array(chosen[::-1])
