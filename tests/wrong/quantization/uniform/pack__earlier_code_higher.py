"""chapters.quantization.uniform.pack: puts the earlier of two codes into the higher bits of a byte."""


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    checked(codes, bits)
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= 2**bits:
        raise ValueError(f"codes must be integers below 2**{bits}, got {codes.dtype}, {codes.min()} to {codes.max()}")
    if codes.shape[-1] * bits % 8:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes")
    each = max(1, 8 // bits)
    codes = codes.reshape(*codes.shape[:-1], -1, each)[..., ::-1].reshape(codes.shape)
    stream = codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1  # […, n, bits]
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
