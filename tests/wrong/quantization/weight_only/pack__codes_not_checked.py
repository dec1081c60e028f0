"""chapters.quantization.weight_only.pack: large codes run into the next nibble."""


def pack(codes: np.ndarray) -> np.ndarray:
    if codes.ndim != 2 or codes.size == 0 or codes.shape[1] % 32 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers [out, in], in a multiple of 32, got {codes.dtype} {codes.shape}")
    nibbles = codes.reshape(len(codes), -1, 8, 4).astype(np.uint32)  # [out, in / 32, place, word]
    words = np.bitwise_or.reduce(nibbles << PLACES, axis=2)
    return words.reshape(len(codes), -1).view(np.int32)
