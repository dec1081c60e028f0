"""chapters.attention.flash_variants.modified_scores: clips scores at the cap instead of bending them."""


def modified_scores(
    scores: np.ndarray, distance: np.ndarray, left: float, right: float, softcap: float | None = None,
    slopes: np.ndarray | None = None,
) -> np.ndarray:
    if softcap is not None:
        scores = np.clip(scores, -softcap, softcap)
    if slopes is not None:
        scores = scores - slopes * np.abs(distance).astype(scores.dtype)
    return np.where((-left <= distance) & (distance <= right), scores, -np.inf).astype(scores.dtype)
