"""chapters.quantization.awq.search_clip: squares the mean error instead of averaging the squares."""


def search_clip(
    weight: np.ndarray, x: np.ndarray, bits: int, group_size: int | None = None, samples: int = 512
) -> np.ndarray:
    exact, size = checked(weight, bits, group_size)
    weight, x = weight.astype(np.result_type(weight, np.float32)), np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != weight.shape[1] or len(x) == 0 or samples < 1 or not np.isfinite(x).all():
        raise ValueError(f"need finite x [tokens, {weight.shape[1]}] and samples >= 1, got x {x.shape}, {samples}")
    x = x[:: max(len(x) // samples, 1)].reshape(-1, weight.shape[1] // size, size).swapaxes(0, 1)
    moments = x.mean(axis=1)[:, :, None] * x.mean(axis=1)[:, None, :]  # [groups, size, size]; mean (x · e)² = e · mean(x xᵀ) · e
    largest = np.abs(weight.reshape(len(weight), -1, size)).max(axis=-1)  # [out, groups]
    limit, least = largest.copy(), np.full(largest.shape, np.inf)
    for shrink in SHRINKS.tolist():
        error = quantize(clip(weight, shrink * largest), bits, group_size).dequantize() - exact
        error = error.reshape(len(weight), -1, size).swapaxes(0, 1)  # [groups, out, size]
        loss = ((error @ moments) * error).sum(axis=-1).T
        better = loss < least
        limit[better], least[better] = (shrink * largest)[better], loss[better]
    return limit
