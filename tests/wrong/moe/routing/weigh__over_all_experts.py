"""chapters.moe.routing.weigh: divides by the gates of all experts, which sum to 1."""


def weigh(p: np.ndarray, expert: np.ndarray, kept: np.ndarray, renormalise: Renormalise = "never") -> np.ndarray:
    if renormalise not in ("never", "before", "after"):
        raise ValueError(f'renormalise must be "never", "before" or "after", got {renormalise!r}')
    weight = np.take_along_axis(p, expert, axis=1)
    counted = kept if renormalise == "after" else np.ones_like(kept)
    total = p.sum(axis=1, keepdims=True)
    if renormalise != "never":
        weight = weight / np.where(total > 0, total, 1)
    return weight * kept
