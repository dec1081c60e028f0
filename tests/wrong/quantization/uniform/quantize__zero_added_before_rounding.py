"""chapters.quantization.uniform.quantize: adds zero before rounding, so that an odd zero turns ties around."""


def quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is far beyond the grid is clipped like the rest
        return np.clip(np.rint(checked(x, bits) * (1 / scale) + zero), 0, 2**bits - 1).astype(np.uint8)
