"""chapters.moe.batch_priority.importance_loss: grows with the number of tokens."""


def importance_loss(p: np.ndarray, correction: int = 0) -> float:
    if p.ndim != 2 or p.size == 0 or p.shape[1] <= correction or not np.isfinite(p).all():
        raise ValueError(f"p must be finite, of tokens and more than {correction} experts, got shape {p.shape}")
    return float(p.sum(axis=0).var(ddof=correction))
