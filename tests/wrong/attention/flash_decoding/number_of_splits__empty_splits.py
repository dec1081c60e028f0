"""chapters.attention.flash_decoding.number_of_splits: counts that leave the longest run as it was."""


def number_of_splits(programs: int, multiprocessors: int, tiles: int, most: int = 128) -> int:
    given = {"programs": programs, "multiprocessors": multiprocessors, "tiles": tiles, "most": most}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if 5 * programs >= 4 * multiprocessors:
        return 1
    longest = [math.inf, *(-(-tiles // splits) for splits in range(1, min(most, multiprocessors, tiles) + 1))]
    work = {s: busy(programs * s, multiprocessors) for s in range(1, len(longest))}
    return min(splits for splits, share in work.items() if share >= 0.85 * max(work.values()))
