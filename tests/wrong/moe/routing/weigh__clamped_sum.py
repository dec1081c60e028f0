"""chapters.moe.routing.weigh: a sum is at least the machine epsilon, as in DeepSpeed."""


def weigh(p: np.ndarray, expert: np.ndarray, kept: np.ndarray, renormalise: Renormalise = "never") -> np.ndarray:
    if renormalise not in ("never", "before", "after"):
        raise ValueError(f'renormalise must be "never", "before" or "after", got {renormalise!r}')
    weight = np.take_along_axis(p, expert, axis=1)
    counted = kept if renormalise == "after" else np.ones_like(kept)
    total = (weight * counted).sum(axis=1, keepdims=True)
    if renormalise != "never":
        weight = weight / np.maximum(total, np.finfo(p.dtype).eps)
    return weight * kept
