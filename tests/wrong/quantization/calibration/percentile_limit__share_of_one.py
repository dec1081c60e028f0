"""chapters.quantization.calibration.percentile_limit: takes percent as a share of one."""


def percentile_limit(histogram: Histogram, percent: float) -> float:
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
    reached = np.cumsum(histogram.counts)
    return int(np.searchsorted(reached, percent * reached[-1]).clip(max=len(reached) - 1)) * histogram.width
