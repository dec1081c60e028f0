"""chapters.quantization.lut_gemm.greedy: one scale for all groups of a row."""


def greedy(weight: np.ndarray, bits: int, group_size: int | None = None) -> BinaryCoded:
    weight, size = checked(weight, bits, group_size)
    rest = weight.reshape(len(weight), -1, size)
    signs, alpha = [], []
    for _ in range(bits):
        signs.append(np.where(rest < 0, -1, 1).astype(np.int8))
        alpha.append(np.abs(rest).mean(axis=(1, 2))[:, None] + np.zeros(rest.shape[:2]))
        rest = rest - alpha[-1][..., None] * signs[-1]
    held = np.stack(signs, axis=-1).reshape(*weight.shape, bits)
    return BinaryCoded(held, np.stack(alpha, axis=-1), np.zeros(rest.shape[:2]))
