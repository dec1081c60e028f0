"""chapters.quantization.uniform.quantize: computes in float32 whatever it is given."""


def quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is far beyond the grid is clipped like the rest
        return np.clip(np.rint(checked(x, bits).astype(np.float32) * np.float32(1 / scale)) + zero, 0, 2**bits - 1).astype(np.uint8)
