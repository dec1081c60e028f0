"""chapters.quantization.qat.lsq_codes: stores every code as uint8."""


def lsq_codes(x: np.ndarray, scale: np.ndarray, bits: int, signed: bool = True) -> np.ndarray:
    low, high = limits(bits, signed)
    codes = np.rint(np.clip(quotients(x, scale), low, high))
    return codes.astype(np.uint8).reshape(np.shape(x))
