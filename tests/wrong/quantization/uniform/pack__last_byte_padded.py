"""chapters.quantization.uniform.pack: fills up a byte that is not whole."""


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    checked(codes, bits)
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= 2**bits:
        raise ValueError(f"codes must be integers below 2**{bits}, got {codes.dtype}, {codes.min()} to {codes.max()}")
    stream = codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1  # […, n, bits]
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
