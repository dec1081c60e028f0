"""chapters.quantization.awq.quantize: leaves zero points outside of the codes."""


def quantize(weight: np.ndarray, bits: int, group_size: int | None = None) -> Quantized:
    size, top = checked(weight, bits, group_size)[1], 2**bits - 1
    groups = weight.astype(np.result_type(weight, np.float32)).reshape(len(weight), -1, size)  # [out, groups, size]
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    scale = np.maximum(high - low, 1e-5) / top
    if not np.isfinite(scale).all():
        raise ValueError(f"weight has a range from {low.min()} to {high.max()}, which {scale.dtype} cannot hold")
    zero = -np.rint(low / scale)
    codes = (np.rint(groups / scale[..., None]) + zero[..., None]).clip(0, top).astype(np.uint8)
    grids = scale.astype(np.float64), zero.astype(np.float64)
    return Quantized(codes.reshape(weight.shape), *grids, np.arange(weight.shape[1]) // size, bits)
