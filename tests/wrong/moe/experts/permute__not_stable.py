"""chapters.moe.experts.permute: the last of an expert comes first."""


def permute(expert: np.ndarray, kept: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    if expert.ndim != 2 or kept.shape != expert.shape:
        raise ValueError(f"expert and kept must both be [tokens, k], got shapes {expert.shape} and {kept.shape}")
    if experts < 1 or (expert.size and not 0 <= expert.min() <= expert.max() < experts):
        raise ValueError(f"expert must be in range(experts), at least 1, got experts={experts} and {np.unique(expert)}")
    group = np.where(kept, expert, experts).ravel()
    runs = np.bincount(group, minlength=experts + 1)[:experts]
    offsets = np.concatenate(([0], np.cumsum(runs)))
    return np.lexsort((-np.arange(group.size), group)), offsets.astype(np.int64)
