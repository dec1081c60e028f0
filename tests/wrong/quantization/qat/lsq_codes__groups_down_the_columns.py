"""chapters.quantization.qat.lsq_codes: takes columns for groups."""


def lsq_codes(x: np.ndarray, scale: np.ndarray, bits: int, signed: bool = True) -> np.ndarray:
    low, high = limits(bits, signed)
    quotients(x, scale)
    codes = np.rint(np.clip(cut(x, len(scale)).reshape(-1, len(scale)) / scale, low, high))
    return codes.astype(np.int8 if signed else np.uint8).reshape(np.shape(x))
