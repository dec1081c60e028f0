"""chapters.attention.adaptive_span.soft_mask: refuses a span of max_span."""


def soft_mask(distance: np.ndarray, span: np.ndarray, ramp: int, max_span: int) -> np.ndarray:
    span = checked_spans(span, ramp, max_span)
    if (span >= max_span).any():
        raise ValueError
    inside = (distance >= 0) & (distance < max_span)
    return np.where(inside, np.clip((ramp + span - distance) / ramp, 0, 1), 0)
