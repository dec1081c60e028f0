"""chapters.quantization.lut_gemm.refine: sorts the scales without their absolute values."""


def refine(weight: np.ndarray, coded: BinaryCoded) -> BinaryCoded:
    if weight.shape != coded.signs.shape[:2]:
        raise ValueError(f"weight must be [out, in] = {coded.signs.shape[:2]} like coded, got {weight.shape}")
    rows, groups, planes = coded.alpha.shape
    target = weight.astype(np.float64).reshape(rows, groups, -1) - coded.offset[..., None]
    signs = coded.signs.reshape(rows, groups, -1, planes).astype(np.float64)
    across = signs.swapaxes(2, 3)  # [out, groups, planes, size]
    rest = target[..., None] - signs @ coded.alpha[..., None]
    # rcond: the products of signs are small integers, and an eigenvalue that is not 0 is far from it.
    step = np.linalg.pinv(across @ signs, rcond=1e-9, hermitian=True) @ (across @ rest)
    alpha = -np.sort(-(coded.alpha + step[..., 0]), axis=-1)
    return BinaryCoded(nearest_signs(target, alpha).reshape(coded.signs.shape), alpha, coded.offset)
