"""chapters.quantization.lut_gemm.nearest_signs: plane by plane the sign of what is left, which is not always the nearest sum."""


def nearest_signs(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    signs = np.empty((*values.shape, alpha.shape[-1]), np.int8)
    rest = values.astype(float)
    for plane in range(alpha.shape[-1]):
        signs[..., plane] = np.where(rest < 0, -1, 1)
        rest = rest - alpha[..., None, plane] * signs[..., plane]
    return signs
