"""chapters.quantization.calibration.divergence: computes KL(Q ‖ P)."""


def divergence(bins: np.ndarray, stop: int, levels: int) -> float:
    level = np.arange(stop) * levels // stop
    live = bins[:stop] > 0
    shared = np.bincount(level[live], bins[:stop][live], levels) / np.maximum(np.bincount(level[live], None, levels), 1)
    p, q = bins[:stop].copy(), np.where(live, shared[level], 0)
    p[-1] += bins[stop:].sum()
    p, q = p / p.sum(), q / max(q.sum(), np.finfo(float).tiny)
    present = q > 0
    with np.errstate(divide="ignore"):
        return float((q[present] * np.log(q[present] / p[present])).sum())
