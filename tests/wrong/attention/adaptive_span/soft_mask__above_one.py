"""chapters.attention.adaptive_span.soft_mask: near keys count for more than 1."""


def soft_mask(distance: np.ndarray, span: np.ndarray, ramp: int, max_span: int) -> np.ndarray:
    span = checked_spans(span, ramp, max_span)
    inside = (distance >= 0) & (distance < max_span)
    return np.where(inside, np.maximum((ramp + span - distance) / ramp, 0), 0)
