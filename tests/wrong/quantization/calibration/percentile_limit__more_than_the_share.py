"""chapters.quantization.calibration.percentile_limit: a bin that just reaches the share is not enough."""


def percentile_limit(histogram: Histogram, percent: float) -> float:
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
    reached = np.cumsum(histogram.counts)
    place = np.searchsorted(100 * reached, percent * reached[-1], side="right").clip(max=len(reached) - 1)
    return int(place) * histogram.width
