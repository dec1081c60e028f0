"""chapters.attention.flash_variants.modified_scores: integers times float32 slopes are float64, and so are the scores from there on."""


def modified_scores(
    scores: np.ndarray, distance: np.ndarray, left: float, right: float, softcap: float | None = None,
    slopes: np.ndarray | None = None,
) -> np.ndarray:
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes * np.abs(distance)
    return np.where((-left <= distance) & (distance <= right), scores, -np.inf)
