"""chapters.quantization.gptq.quantize: allows 2**bits as a code."""


def quantize(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(weight / scale) + zero, 0, 2**bits).astype(np.uint8)
