"""chapters.attention.flash_variants.modified_scores: returns the dtype that slopes and scores make together."""


def modified_scores(
    scores: np.ndarray, distance: np.ndarray, left: float, right: float, softcap: float | None = None,
    slopes: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    modified = scores if softcap is None else softcap * np.tanh(scores / softcap)
    if slopes is not None:
        modified = modified - slopes * np.abs(distance).astype(scores.dtype)
    return np.where((-left <= distance) & (distance <= right), modified, -np.inf)
