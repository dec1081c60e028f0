"""chapters.quantization.uniform.running_range: forgets all batches but the last."""


def running_range(batches: Iterable[np.ndarray], momentum: float | None = None) -> tuple[float, float]:
    if momentum is not None and not 0 < momentum <= 1:
        raise ValueError(f"momentum must be None, or above 0 and at most 1, got {momentum}")
    ends = np.array([(np.min(x), np.max(x)) for x in (checked(batch, 8) for batch in batches)], dtype=np.float64)
    if len(ends) == 0:
        raise ValueError("batches must hold at least one: static parameters need calibration data")
    low, high = ends[-1, 0], ends[-1, 1]
    if momentum is not None:
        low, high = reduce(lambda now, new: now + momentum * (new - now), ends)
    return min(float(low), 0.0), max(float(high), 0.0)
