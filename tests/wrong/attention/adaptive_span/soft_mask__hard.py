"""chapters.attention.adaptive_span.soft_mask: the mask falls from 1 to 0 at once, at the end of the span."""


def soft_mask(distance: np.ndarray, span: np.ndarray, ramp: int, max_span: int) -> np.ndarray:
    span = checked_spans(span, ramp, max_span)
    inside = (distance >= 0) & (distance < max_span)
    return np.where(inside, 1.0 * (distance <= span), 0)
