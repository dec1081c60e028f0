"""chapters.moe.batch_priority.importance_loss: adds in the dtype of the gates."""


def importance_loss(p: np.ndarray, correction: int = 0) -> float:
    if p.ndim != 2 or p.size == 0 or p.shape[1] <= correction or not np.isfinite(p).all():
        raise ValueError(f"p must be finite, of tokens and more than {correction} experts, got shape {p.shape}")
    return spread(p.sum(axis=0), correction)
