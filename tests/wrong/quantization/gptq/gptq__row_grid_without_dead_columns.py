"""chapters.quantization.gptq.gptq: fits the grids of whole rows after dead weights were zeroed."""


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    mse: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
) -> Quantized:
    weight, size = checked(weight, bits, group_size)
    hessian = checked_hessian(hessian, weight.shape[1], damping, block_size).copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    rest, columns = np.where(dead, 0, weight), np.arange(weight.shape[1])
    fit = partial(find_grid, bits=bits, symmetric=symmetric, mse=mse)
    scale, zero = fit(rest.reshape(len(rest), -1, size))  # [out, groups]
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else columns
    group = (order if static_groups else columns) // size
    upper = inverse_factor(hessian[np.ix_(order, order)], damping)
    rest, codes = rest[:, order], np.empty(weight.shape, np.uint8)
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        block, errors = rest[:, start:stop].copy(), np.empty((len(rest), stop - start))
        for i in range(start, stop):
            j, g = i - start, group[i]
            if i % size == 0 and group_size is not None and not static_groups:
                scale[:, g], zero[:, g] = fit(rest[:, i : i + size])  # `rest`, not `block`: see above
            codes[:, order[i]] = code = quantize(block[:, j], scale[:, g], zero[:, g], bits)
            errors[:, j] = (block[:, j] - dequantize(code, scale[:, g], zero[:, g])) / upper[i, i]
            block[:, j:] -= np.outer(errors[:, j], upper[i, i:stop])
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return Quantized(codes, scale, zero, group[np.argsort(order)], bits)
