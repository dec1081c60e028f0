"""chapters.quantization.lut_gemm.greedy: takes np.sign, which is 0 at 0."""


def greedy(weight: np.ndarray, bits: int, group_size: int | None = None) -> BinaryCoded:
    weight, size = checked(weight, bits, group_size)
    rest = weight.reshape(len(weight), -1, size)
    signs, alpha = [], []
    for _ in range(bits):
        signs.append(np.sign(rest).astype(np.int8))
        alpha.append(np.abs(rest).mean(axis=-1))
        rest = rest - alpha[-1][..., None] * signs[-1]
    held = np.stack(signs, axis=-1).reshape(*weight.shape, bits)
    return BinaryCoded(held, np.stack(alpha, axis=-1), np.zeros(rest.shape[:2]))
