"""chapters.moe.batch_priority.importance_loss: divides by a mean of 0."""


def importance_loss(p: np.ndarray, correction: int = 0) -> float:
    if p.ndim != 2 or p.size == 0 or p.shape[1] <= correction or not np.isfinite(p).all():
        raise ValueError(f"p must be finite, of tokens and more than {correction} experts, got shape {p.shape}")
    importance = p.sum(axis=0)
    return float(importance.var(ddof=correction) / importance.mean() ** 2)
