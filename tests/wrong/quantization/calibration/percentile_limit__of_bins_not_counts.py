"""chapters.quantization.calibration.percentile_limit: takes the share of bins, not of counts."""


def percentile_limit(histogram: Histogram, percent: float) -> float:
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
    reached = np.arange(1, len(histogram.counts) + 1) / len(histogram.counts)
    return int(np.searchsorted(reached, percent / 100).clip(max=len(reached) - 1)) * histogram.width
