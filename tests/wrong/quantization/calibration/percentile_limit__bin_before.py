"""chapters.quantization.calibration.percentile_limit: stops a bin early."""


def percentile_limit(histogram: Histogram, percent: float) -> float:
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
    reached = np.cumsum(histogram.counts / histogram.counts.sum())
    return int(np.maximum(np.searchsorted(reached, percent / 100) - 1, 0)) * histogram.width
