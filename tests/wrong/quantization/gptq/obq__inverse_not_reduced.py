"""chapters.quantization.gptq.obq: leaves the done weight in the inverse Hessian."""


def obq(
    weight: np.ndarray, hessian: np.ndarray, bits: int, symmetric: bool = False, mse: bool = False, damping: float = 0
) -> Quantized:
    w, _ = checked(weight, bits, None)
    hessian = checked_hessian(hessian, w.shape[1], damping, 1).copy()
    dead, row, left = np.diag(hessian) == 0, np.arange(len(w)), np.ones(w.shape, bool)
    hessian[dead, dead], w[:, dead] = 1, 0
    upper, codes = inverse_factor(hessian, damping), np.empty(w.shape, np.uint8)
    inverse = np.repeat((upper.T @ upper)[None], len(w), axis=0)  # [out, in, in]
    scale, zero = find_grid(w[:, None], bits, symmetric, mse)  # [out, 1]
    for _ in range(w.shape[1]):
        nearest = quantize(w, scale, zero, bits)
        error = w - dequantize(nearest, scale, zero)
        squares = np.where(left, error**2, 0)
        cost = np.divide(squares, np.einsum("rjj->rj", inverse), out=np.full(w.shape, np.inf), where=left)
        cost[left & (w == 0)] = -1
        j = cost.argmin(axis=1)
        outlier = (squares > scale**2 / 4).any(axis=1) & (w[row, j] != 0)
        j = np.where(outlier, squares.argmax(axis=1), j)
        codes[row, j], left[row, j] = nearest[row, j], False
        spread = inverse[row, :, j] / inverse[row, j, j][:, None]  # [out, in]
        w -= spread * error[row, j][:, None]
    return Quantized(codes, scale, zero, np.zeros(w.shape[1], int), bits)
