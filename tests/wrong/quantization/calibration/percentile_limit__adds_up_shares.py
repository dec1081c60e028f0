"""chapters.quantization.calibration.percentile_limit: the sum of shares misses the percentage by rounding."""


def percentile_limit(histogram: Histogram, percent: float) -> float:
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
    reached = np.cumsum(histogram.counts / histogram.counts.sum())
    return int(np.searchsorted(reached, percent / 100).clip(max=len(reached) - 1)) * histogram.width
