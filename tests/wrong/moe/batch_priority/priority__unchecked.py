"""chapters.moe.batch_priority.priority: sorts NaN to some place."""


def priority(score: np.ndarray) -> np.ndarray:
    if score.ndim != 1:
        raise ValueError(f"score must be a vector without NaN, got shape {score.shape}")
    return np.argsort(-score, kind="stable")
