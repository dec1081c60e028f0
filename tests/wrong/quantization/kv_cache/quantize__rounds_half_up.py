"""chapters.quantization.kv_cache.quantize: rounds halves up, not to the even code."""


def quantize(
    x: np.ndarray, bits: int, group_size: int, per: Per = "token", rule: Literal["flexgen", "kivi"] = "flexgen"
) -> tuple[np.ndarray, np.ndarray]:
    if bits not in range(1, 9) or group_size < 1 or per not in AXES or rule not in ("flexgen", "kivi"):
        raise ValueError(f"need bits 1 .. 8, group_size >= 1 and known names, got {bits}, {group_size}, {per}, {rule}")
    if x.dtype.kind != "f" or x.ndim < 2 or x.size == 0:
        raise ValueError(f"x must be non-empty floating point [.., T, D], got {x.dtype} {x.shape}")
    along, top = np.moveaxis(x, AXES[per], -1), 2**bits - 1
    extra = -along.shape[-1] % group_size
    if extra and rule == "kivi":
        raise ValueError(f"group_size must divide the {along.shape[-1]} numbers per {per}, got {group_size}")
    filled = np.concatenate([along, np.zeros((*along.shape[:-1], extra), x.dtype)], axis=-1)
    groups = filled.reshape(*along.shape[:-1], -1, group_size)
    with np.errstate(all="ignore"):  # groups without a range divide by zero, and are put right below
        low, span = groups.min(axis=-1, keepdims=True), np.ptp(groups, axis=-1, keepdims=True)
        if not np.isfinite(span).all():
            raise ValueError(f"x must be finite and its ranges fit {x.dtype}, got {x.min()} to {x.max()}")
        factor, step = 1 / span * top, span / top
        scaled = (groups - low) * factor if rule == "flexgen" else (groups - low) / step
        step = 1 / factor if rule == "flexgen" else step
    flat = (step == 0) | ((rule == "flexgen") & np.isinf(factor))
    codes = np.where(flat, 0, np.floor(scaled.clip(0, top) + 0.5)).astype(np.uint8).reshape(filled.shape)
    grid = np.concatenate([np.where(flat, 0, step).astype(x.dtype), low], axis=-1)
    codes = np.moveaxis(codes[..., : along.shape[-1]], -1, AXES[per])
    return codes, grid if per == "token" else grid.swapaxes(-2, -3)
