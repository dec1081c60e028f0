"""chapters.quantization.awq.search_scales: averages inputs in their own precision."""


def search_scales(
    weights: Sequence[np.ndarray], x: np.ndarray, outputs: Outputs, bits: int, group_size: int | None = None
) -> Scaling:
    x = np.asarray(x).reshape(-1, x.shape[-1])
    if x.size == 0 or any(weight.shape[-1] != x.shape[1] for weight in weights):
        raise ValueError(f"x {x.shape} must hold tokens of the weights' inputs, got {[w.shape for w in weights]}")
    expected, magnitude = outputs(list(weights)), np.abs(x).mean(axis=0)
    losses = np.empty(len(RATIOS))
    for i, ratio in enumerate(RATIOS):
        scales = channel_scales(magnitude, ratio)
        rounded = [quantize(weight * scales, bits, group_size).dequantize() / scales for weight in weights]
        losses[i] = np.mean((outputs(rounded) - expected) ** 2)
    if not np.isfinite(losses).all():
        raise ValueError("outputs must be finite: those of the weights as they are, and of the quantized ones")
    best = int(np.argmin(losses))  # the first of equals
    return Scaling(float(RATIOS[best]), channel_scales(magnitude, RATIOS[best]), losses)
