"""chapters.attention.patterns.attend_row: takes 1/√D for the scale, whatever is given."""


def attend_row(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: BlockMask, head: int, row: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    acc, S = np.zeros_like(q), k.shape[-2]
    total = np.zeros_like(acc[..., :1])
    maximum = np.full_like(total, -np.inf)
    for column in np.flatnonzero(mask.partial[head, row] | mask.full[head, row]):
        columns = slice(column * mask.block_k, min((column + 1) * mask.block_k, S))
        scores = q.shape[-1] ** -0.5 * (q @ k[..., columns, :].swapaxes(-1, -2))
        if mask.partial[head, row, column]:
            seen = mask.tokens[mask.slots[head, row, column]]
            scores = np.where(seen[: q.shape[-2], : columns.stop - columns.start], scores, -np.inf)
        maximum, total, acc = absorb_tile(maximum, total, acc, scores, v[..., columns, :])
    total = np.where(total > 0, total, 1)
    return acc / total, (maximum + np.log(total))[..., 0]
