"""chapters.quantization.gobo.codebook_matmul: computes in the precision of x."""


def codebook_matmul(
    x: np.ndarray, packed: np.ndarray, centroids: np.ndarray, start: np.ndarray, column: np.ndarray, extra: np.ndarray
) -> np.ndarray:
    (rows, columns), bits = (len(start) - 1, x.shape[-1]), len(centroids).bit_length() - 1
    fits = packed.shape == (-(-rows // 4), bits, -(-columns // 32), 4) and len(centroids) == 2**bits
    if x.ndim != 2 or not fits or not start[-1] == len(column) == len(extra):
        shapes = ", ".join(str(part.shape) for part in (x, packed, centroids, start, column, extra))
        raise ValueError(f"x, packed, centroids, start, column, extra do not fit together: {shapes}")
    weight = centroids.astype(np.float64)[unpack(packed, rows, columns)]
    np.add.at(weight, (np.repeat(np.arange(rows), np.diff(start)), column.astype(int)), extra.astype(np.float64))
    return x @ weight.T.astype(x.dtype)
