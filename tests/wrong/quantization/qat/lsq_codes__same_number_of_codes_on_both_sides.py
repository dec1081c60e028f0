"""chapters.quantization.qat.lsq_codes: never uses the least code."""


def lsq_codes(x: np.ndarray, scale: np.ndarray, bits: int, signed: bool = True) -> np.ndarray:
    low, high = limits(bits, signed)
    codes = np.rint(np.clip(quotients(x, scale), -high if signed else low, high))
    return codes.astype(np.int8 if signed else np.uint8).reshape(np.shape(x))
