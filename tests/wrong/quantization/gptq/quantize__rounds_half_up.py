"""chapters.quantization.gptq.quantize: halves go up instead of to the even number."""


def quantize(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.floor(weight / scale + 0.5) + zero, 0, 2**bits - 1).astype(np.uint8)
