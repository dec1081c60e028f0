"""chapters.quantization.uniform.grid: treats a range without negative numbers like any other in gptq."""


def grid(low: np.ndarray, high: np.ndarray, bits: int, scheme: str = "asymmetric") -> tuple[np.ndarray, np.ndarray]:
    low, high = checked(low, bits), checked(high, bits)
    if (low > 0).any() or (high < 0).any():
        raise ValueError(f"need low <= 0 <= high, got low up to {low.max()} and high from {high.min()}")
    with np.errstate(over="ignore"):
        if scheme == "asymmetric":
            scale = (high - low) / (2**bits - 1)
        else:
            up, down = reach(bits, scheme)
            widest = high
            scale = np.maximum(widest / up, -low / down)
    if not np.isfinite(scale).all():
        raise ValueError(f"the range from {low.min()} to {high.max()} is too wide for {scale.dtype}")
    scale = np.where(scale < np.finfo(scale.dtype).tiny, scale.dtype.type(1), scale)
    if scheme == "asymmetric":
        return scale, np.rint(-low / scale).clip(0, 2**bits - 1)
    return scale, np.full_like(scale, 2 ** (bits - 1))
