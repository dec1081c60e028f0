"""chapters.quantization.gptq.quantize: becomes an integer before it is clipped, and wraps around."""


def quantize(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    return np.clip((np.rint(weight / scale) + zero).astype(np.int32), 0, 2**bits - 1).astype(np.uint8)
