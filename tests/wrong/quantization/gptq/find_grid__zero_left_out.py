"""chapters.quantization.gptq.find_grid: the range does not always hold 0."""


def find_grid(weight: np.ndarray, bits: int, symmetric=False, mse=False) -> tuple[np.ndarray, np.ndarray]:
    low, high = weight.min(axis=-1), weight.max(axis=-1)
    if symmetric:
        high = np.maximum(high, -low)
        low = np.where(low < 0, -high, low)
    empty = high == low
    low, high = np.where(empty, -1, low), np.where(empty, 1, high)
    scale, zero = _grid_between(low, high, bits, symmetric)
    if not mse:
        return scale, zero
    least = np.full(scale.shape, np.inf)
    for shrink in 1 - np.arange(80) / 100:
        steps, offsets = _grid_between(shrink * low, shrink * high, bits, symmetric)
        grid = steps[..., None], offsets[..., None]
        error = (np.abs(dequantize(quantize(weight, *grid, bits), *grid) - weight) ** 2.4).sum(axis=-1)
        better = error < least
        least[better], scale[better], zero[better] = error[better], steps[better], offsets[better]
    return scale, zero
