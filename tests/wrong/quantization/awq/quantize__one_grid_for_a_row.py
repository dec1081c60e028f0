"""chapters.quantization.awq.quantize: ignores the groups."""


def quantize(weight: np.ndarray, bits: int, group_size: int | None = None) -> Quantized:
    size, top = checked(weight, bits, group_size)[1], 2**bits - 1
    groups = weight.astype(np.result_type(weight, np.float32)).reshape(len(weight), -1, size)  # [out, groups, size]
    low, high = (np.repeat(end, groups.shape[1], axis=1) for end in (groups.min(axis=(1, 2))[:, None], groups.max(axis=(1, 2))[:, None]))
    scale = np.maximum(high - low, 1e-5) / top
    if not np.isfinite(scale).all():
        raise ValueError(f"weight has a range from {low.min()} to {high.max()}, which {scale.dtype} cannot hold")
    zero = (-np.rint(low / scale)).clip(0, top)
    codes = (np.rint(groups / scale[..., None]) + zero[..., None]).clip(0, top).astype(np.uint8)
    grids = scale.astype(np.float64), zero.astype(np.float64)
    return Quantized(codes.reshape(weight.shape), *grids, np.arange(weight.shape[1]) // size, bits)
