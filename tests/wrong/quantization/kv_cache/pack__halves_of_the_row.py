"""chapters.quantization.kv_cache.pack: puts channels i and i + D / 2 into one byte."""


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits not in PACKED_BITS or codes.dtype.kind != "u" or codes.shape[-1] * bits % 8:
        raise ValueError(
            f"need 2, 4 or 8 bits and unsigned codes that fill bytes, got {bits}, {codes.dtype} {codes.shape}"
        )
    if codes.size and codes.max() >= 2**bits:
        raise ValueError(f"codes must be below 2^{bits}, got {codes.max()}")
    neighbours = codes.astype(np.uint8).reshape(*codes.shape[:-1], 8 // bits, codes.shape[-1] * bits // 8).swapaxes(-1, -2)
    return np.bitwise_or.reduce(neighbours << places(bits), axis=-1)
