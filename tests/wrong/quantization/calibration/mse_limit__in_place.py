"""chapters.quantization.calibration.mse_limit: empties the first bin of the histogram that it was given."""


def mse_limit(histogram: Histogram, bits: int, unsigned: bool = False, start: int = 128, stride: int = 1) -> float:
    top = 2 ** (bits - 1 + unsigned) - 1
    centers = (np.arange(len(histogram.counts)) + 0.5) * histogram.width
    limits = centers[_candidates(histogram, bits, start, len(centers), stride)]
    histogram.counts[0] = 0
    errors = []
    for limit in limits:
        values = np.minimum(np.rint(centers / (limit / top)), top) * (limit / top)
        errors.append(((values - centers) ** 2 * histogram.counts).sum())
    return float(limits[np.argmin(errors)])
