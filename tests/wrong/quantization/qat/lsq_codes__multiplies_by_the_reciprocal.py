"""chapters.quantization.qat.lsq_codes: multiplies by 1 / scale."""


def lsq_codes(x: np.ndarray, scale: np.ndarray, bits: int, signed: bool = True) -> np.ndarray:
    low, high = limits(bits, signed)
    codes = np.rint(np.clip(cut(x, len(scale)) * (1 / scale[:, None]), low, high))
    return codes.astype(np.int8 if signed else np.uint8).reshape(np.shape(x))
