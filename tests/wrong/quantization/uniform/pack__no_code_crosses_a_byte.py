"""chapters.quantization.uniform.pack: lets no code cross from one byte to the next, and drops what then is too much."""


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    checked(codes, bits)
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= 2**bits:
        raise ValueError(f"codes must be integers below 2**{bits}, got {codes.dtype}, {codes.min()} to {codes.max()}")
    if codes.shape[-1] * bits % 8:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes")
    stream = codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1  # […, n, bits]
    each, count = 8 // bits, codes.shape[-1] * bits // 8
    wide = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // each), 8), np.uint8)
    for i in range(codes.shape[-1]):
        wide[..., i // each, i % each * bits : (i % each + 1) * bits] = stream[..., i, :]
    return np.packbits(wide, axis=-1, bitorder="little")[..., 0].reshape(*codes.shape[:-1], -1)[..., :count]
