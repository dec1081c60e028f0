"""chapters.attention.adaptive_span.soft_mask: one key too many: max_span keys before the query, and itself."""


def soft_mask(distance: np.ndarray, span: np.ndarray, ramp: int, max_span: int) -> np.ndarray:
    span = checked_spans(span, ramp, max_span)
    inside = (distance >= 0) & (distance <= max_span)
    return np.where(inside, np.clip((ramp + span - distance) / ramp, 0, 1), 0)
