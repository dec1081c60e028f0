"""chapters.sparsity.n_m.compress_n_m: stores the last zeros of a group that has fewer than n non-zeros."""


def compress_n_m(weight: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    bits, kept = index_bits(m), n_m_mask(weight[:, ::-1], n, m)[:, ::-1]
    if (lost := (weight != 0) & ~kept).any():
        row, column = np.argwhere(lost)[0]
        start = column // m * m
        raise ValueError(f"weight is not {n}:{m}: row {row}, columns {start} to {start + m - 1} hold more non-zeros")
    index = np.broadcast_to(np.arange(weight.shape[1]) % m, weight.shape)[kept]
    return weight[kept].reshape(len(weight), -1), pack(index.reshape(len(weight), -1), bits)
