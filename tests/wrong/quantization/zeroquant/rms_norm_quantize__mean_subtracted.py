"""chapters.quantization.zeroquant.rms_norm_quantize: divides by the standard deviation."""


def rms_norm_quantize(
    x: np.ndarray, weight: np.ndarray, eps: float, residual: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if x.ndim != 2 or weight.shape != x.shape[1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"x must be [tokens, dim], residual like it, weight [dim]; got {x.shape}, {weight.shape}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    hidden = x if residual is None else x + residual
    precise = checked(hidden)
    with np.errstate(over="ignore"):  # what overflows is refused
        codes, step = token_codes(precise * weight.astype(precise.dtype))
        mean = checked(precise.var(axis=1), "the mean square of x")
    rms = np.sqrt(mean + precise.dtype.type(eps))
    return codes, step / rms, hidden
