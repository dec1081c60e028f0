"""chapters.quantization.qat.lsq_codes: cuts the fraction off."""


def lsq_codes(x: np.ndarray, scale: np.ndarray, bits: int, signed: bool = True) -> np.ndarray:
    low, high = limits(bits, signed)
    codes = np.trunc(np.clip(quotients(x, scale), low, high))
    return codes.astype(np.int8 if signed else np.uint8).reshape(np.shape(x))
