"""chapters.pruning.rewinding.kept_counts: open_lth drops the ceiling only."""


def kept_counts(weights: int, share: float, levels: int, open_lth: bool = False) -> list[int]:
    if levels < 0:
        raise ValueError(f"levels must not be negative, got {levels}")
    counts = [weights]
    dropped(weights, share)  # its checks, where there is no level to prune to
    for _ in range(levels):
        left = counts[-1]
        gone = math.ceil(share * left) if open_lth else dropped(left, share)
        counts.append(max(1, left - gone))
    return counts
