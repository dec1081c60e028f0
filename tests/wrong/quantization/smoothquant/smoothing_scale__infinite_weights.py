"""chapters.quantization.smoothquant.smoothing_scale: refuses nan alone."""


def smoothing_scale(act_max: np.ndarray, readers: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if not len(readers) or act_max.ndim != 1 or any(w.ndim != 2 or w.shape[1] != len(act_max) for w in readers):
        raise ValueError(f"readers must be [out, {act_max.size}] each, got {[w.shape for w in readers]}")
    if not (np.isfinite(act_max).all() and (act_max >= 0).all() and not any(np.isnan(w).any() for w in readers)):
        raise ValueError("act_max and readers must be finite, and act_max not negative")
    weight_max = np.max([np.abs(w).max(axis=0) for w in readers], axis=0).astype(np.float64)  # [in]
    return np.maximum(act_max.astype(np.float64) ** alpha / np.maximum(weight_max, LEAST) ** (1 - alpha), LEAST)
