"""chapters.attention.heads.rotate: writes into an array like x, which cuts the products of integers."""


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, layout: str = "half") -> np.ndarray:
    half = x.shape[-1] // 2
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if x.shape[-1] % 2 or cos.shape[-1] != half or sin.shape[-1] != half:
        raise ValueError(f"need x [..., D], cos and sin [..., D/2]; got {x.shape}, {cos.shape} and {sin.shape}")
    first, second = (slice(half), slice(half, None)) if layout == "half" else (slice(0, None, 2), slice(1, None, 2))
    a, b = x[..., first], x[..., second]
    out = np.empty_like(x)
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out
