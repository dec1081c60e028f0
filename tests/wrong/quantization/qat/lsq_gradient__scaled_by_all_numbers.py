"""chapters.quantization.qat.lsq_gradient: scales by the numbers of the tensor, not of a group."""


def lsq_gradient(
    x: np.ndarray, scale: np.ndarray, dy: np.ndarray, bits: int, signed: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    (low, high), q = limits(bits, signed), quotients(x, scale)
    if np.shape(dy) != np.shape(x):
        raise ValueError(f"dy must be shaped like x, {np.shape(x)}, got {np.shape(dy)}")
    dy = cut(dy, len(scale))
    inside = (low <= q) & (q <= high)
    change = np.where(inside, np.rint(q) - q, np.clip(q, low, high))
    dscale = (dy * change).sum(axis=1) / math.sqrt(q.size * high)
    return np.where(inside, dy, 0).reshape(np.shape(x)), dscale
