"""chapters.quantization.weight_only.pack: word w of a row starts with column w, however long the row is."""


def pack(codes: np.ndarray) -> np.ndarray:
    if codes.ndim != 2 or codes.size == 0 or codes.shape[1] % 32 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers [out, in], in a multiple of 32, got {codes.dtype} {codes.shape}")
    if codes.min() < 0 or codes.max() > 15:
        raise ValueError(f"codes must be from 0 to 15, got {codes.min()} to {codes.max()}")
    nibbles = codes.reshape(len(codes), 1, 8, -1).astype(np.uint32)
    words = np.bitwise_or.reduce(nibbles << PLACES, axis=2)
    return words.reshape(len(codes), -1).view(np.int32)
