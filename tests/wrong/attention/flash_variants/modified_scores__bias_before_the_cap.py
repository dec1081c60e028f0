"""chapters.attention.flash_variants.modified_scores: adds the bias first, so that the cap bounds it, too."""


def modified_scores(
    scores: np.ndarray, distance: np.ndarray, left: float, right: float, softcap: float | None = None,
    slopes: np.ndarray | None = None,
) -> np.ndarray:
    if slopes is not None:
        scores = scores - slopes * np.abs(distance).astype(scores.dtype)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    return np.where((-left <= distance) & (distance <= right), scores, -np.inf).astype(scores.dtype)
