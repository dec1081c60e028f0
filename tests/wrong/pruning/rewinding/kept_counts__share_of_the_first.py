"""chapters.pruning.rewinding.kept_counts: every level drops the share of all weights, not of those left."""


def kept_counts(weights: int, share: float, levels: int, open_lth: bool = False) -> list[int]:
    if levels < 0:
        raise ValueError(f"levels must not be negative, got {levels}")
    counts = [weights]
    dropped(weights, share)  # its checks, where there is no level to prune to
    for _ in range(levels):
        left = counts[0]
        gone = math.ceil(share * left) + 1 if open_lth else dropped(left, share)
        counts.append(max(1, counts[-1] - gone))
    return counts
