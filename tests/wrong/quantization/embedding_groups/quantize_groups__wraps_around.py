"""chapters.quantization.embedding_groups.quantize_groups: narrows to a byte without clipping."""


def quantize_groups(x: np.ndarray, order: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int = 8) -> np.ndarray:
    if bits not in range(1, 9):
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    channels, groups = x.shape[-1], len(scale)
    if not np.array_equal(np.sort(order), np.arange(channels)):
        raise ValueError(f"order must be a permutation of the {channels} channels of x")
    if scale.shape != zero.shape or groups == 0 or channels % groups:
        raise ValueError(f"scale and zero must be [groups], a divisor of {channels}; got {scale.shape}, {zero.shape}")
    if not (np.isfinite(x).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("x must be finite, and scale positive and finite")
    grouped = x[:, order].reshape(len(x), groups, -1)  # [tokens, groups, channels / groups]
    codes = np.rint(grouped / scale[:, None]) + zero[:, None]
    return codes.astype(np.int64).astype(np.uint8).reshape(x.shape)
