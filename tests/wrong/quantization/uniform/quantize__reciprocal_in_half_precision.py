"""chapters.quantization.uniform.quantize: divides 1 by a float16 scale in float16."""


def quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.clip(np.rint(checked(x, bits) * (1 / scale)) + zero, 0, 2**bits - 1).astype(np.uint8)
