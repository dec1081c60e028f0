"""chapters.quantization.qat.lsq_codes: does not clip."""


def lsq_codes(x: np.ndarray, scale: np.ndarray, bits: int, signed: bool = True) -> np.ndarray:
    low, _ = limits(bits, signed)
    codes = (np.rint(quotients(x, scale)) - low) % 2**bits + low
    return codes.astype(np.int8 if signed else np.uint8).reshape(np.shape(x))
