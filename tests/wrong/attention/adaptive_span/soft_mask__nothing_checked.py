"""chapters.attention.adaptive_span.soft_mask: spans and lengths that make no sense are computed with."""


def soft_mask(distance: np.ndarray, span: np.ndarray, ramp: int, max_span: int) -> np.ndarray:
    inside = (distance >= 0) & (distance < max_span)
    return np.where(inside, np.clip((ramp + span - distance) / ramp, 0, 1), 0)
