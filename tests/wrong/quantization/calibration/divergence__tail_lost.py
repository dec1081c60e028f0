"""chapters.quantization.calibration.divergence: forgets what lies beyond the limit."""


def divergence(bins: np.ndarray, stop: int, levels: int) -> float:
    level = np.arange(stop) * levels // stop
    live = bins[:stop] > 0
    shared = np.bincount(level[live], bins[:stop][live], levels) / np.maximum(np.bincount(level[live], None, levels), 1)
    p, q = bins[:stop].copy(), np.where(live, shared[level], 0)
    p, q = p / p.sum(), q / max(q.sum(), np.finfo(float).tiny)
    present = p > 0
    with np.errstate(divide="ignore"):
        return float((p[present] * np.log(p[present] / q[present])).sum())
