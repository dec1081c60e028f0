"""chapters.quantization.gptq.quantize: divides in float32."""


def quantize(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint((weight / scale).astype(np.float32)) + zero, 0, 2**bits - 1).astype(np.uint8)
