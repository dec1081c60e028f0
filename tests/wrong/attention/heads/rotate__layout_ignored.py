"""chapters.attention.heads.rotate: turns the pairs (i, i + D/2) whatever the layout."""


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, layout: str = "half") -> np.ndarray:
    half = x.shape[-1] // 2
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if x.shape[-1] % 2 or cos.shape[-1] != half or sin.shape[-1] != half:
        raise ValueError(f"need x [..., D], cos and sin [..., D/2]; got {x.shape}, {cos.shape} and {sin.shape}")
    first, second = (slice(half), slice(half, None))
    a, b = x[..., first], x[..., second]
    out = np.empty(x.shape, np.result_type(x, cos, sin))
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out
