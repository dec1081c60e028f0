"""chapters.moe.batch_priority.priority: takes scores that are nearly equal for equal."""


def priority(score: np.ndarray) -> np.ndarray:
    if score.ndim != 1 or np.isnan(score).any():
        raise ValueError(f"score must be a vector without NaN, got shape {score.shape}")
    return np.argsort(-score.astype(np.float32), kind="stable")
