"""chapters.pruning.rewinding.kept_counts: leaves out the count before the first level."""


def kept_counts(weights: int, share: float, levels: int, open_lth: bool = False) -> list[int]:
    if levels < 0:
        raise ValueError(f"levels must not be negative, got {levels}")
    counts = [weights]
    dropped(weights, share)  # its checks, where there is no level to prune to
    for _ in range(levels):
        left = counts[-1]
        gone = math.ceil(share * left) + 1 if open_lth else dropped(left, share)
        counts.append(max(1, left - gone))
    return counts[1:]
