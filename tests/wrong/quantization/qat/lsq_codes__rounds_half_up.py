"""chapters.quantization.qat.lsq_codes: rounds halves up."""


def lsq_codes(x: np.ndarray, scale: np.ndarray, bits: int, signed: bool = True) -> np.ndarray:
    low, high = limits(bits, signed)
    codes = np.floor(np.clip(quotients(x, scale), low, high) + 0.5)
    return codes.astype(np.int8 if signed else np.uint8).reshape(np.shape(x))
