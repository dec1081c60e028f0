"""chapters.attention.flash_decoding.combine: subtracts the largest lse of all queries: what lies far below vanishes."""


def combine(outs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if outs.dtype != lses.dtype or outs.dtype not in (np.float32, np.float64):
        raise TypeError(f"outs and lses must both be float32 or float64, got {outs.dtype} and {lses.dtype}")
    if outs.ndim < 2 or outs.shape[:-1] != lses.shape or outs.shape[0] == 0:
        raise ValueError(f"outs must be [splits, ..., D] and lses [splits, ...], got {outs.shape} and {lses.shape}")
    if np.isnan(lses).any() or np.isposinf(lses).any():
        raise ValueError("lses must be finite, or -inf for a run without keys, got NaN or +inf")
    maximum = np.broadcast_to(lses.max(), lses.shape[1:])
    weights = np.exp(lses - finite(maximum))
    total = weights.sum(axis=0)
    total = np.where(total > 0, total, 1)  # no keys at all: the maximum stays −inf, and so does lse
    seen = np.where(np.isneginf(lses)[..., None], 0, outs)
    return ((weights / total)[..., None] * seen).sum(axis=0), maximum + np.log(total)
