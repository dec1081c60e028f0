"""chapters.moe.batch_priority.priority: leaves the order of equal scores to the sort."""


def priority(score: np.ndarray) -> np.ndarray:
    if score.ndim != 1 or np.isnan(score).any():
        raise ValueError(f"score must be a vector without NaN, got shape {score.shape}")
    return np.argsort(-score)
