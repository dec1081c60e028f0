"""chapters.quantization.weight_only.pack: word w of a row starts with column w, however long the row is."""


def pack(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    if codes.ndim != 2 or codes.size == 0 or codes.shape[1] % span(bits) or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers [out, {span(bits)} k], got {codes.dtype} {codes.shape}")
    if codes.min() < 0 or codes.max() >= 2**bits:
        raise ValueError(f"codes must be from 0 to {2**bits - 1}, got {codes.min()} to {codes.max()}")
    strided = codes.reshape(len(codes), RUNS[bits], 8, -1, 4)
    places = strided.transpose(0, 3, 1, 2, 4).astype(np.uint32)
    words = np.bitwise_or.reduce(places << PLACES, axis=3)  # [out, spans, runs, 4]
    quads, low = words, words & 0x33333333
    if bits < 4:
        quads = low[:, :, ::2] | low[:, :, 1::2] << 2  # [out, spans, runs / 2, 4]
    if bits == 3:
        top = np.bitwise_or.reduce((words >> 2 & 0x11111111) << np.arange(4, dtype=np.uint32)[:, None], axis=2)
        quads = np.concatenate([quads, top[:, :, None]], axis=2)
    return np.ascontiguousarray(quads.swapaxes(1, 2)).reshape(len(codes), -1).view(np.int32)
