"""chapters.sparsity.n_m.compress_n_m: drops what a group has too much of without a word, as torch does."""


def compress_n_m(weight: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    bits, kept = index_bits(m), n_m_mask(weight, n, m)
    index = np.broadcast_to(np.arange(weight.shape[1]) % m, weight.shape)[kept]
    return weight[kept].reshape(len(weight), -1), pack(index.reshape(len(weight), -1), bits)
