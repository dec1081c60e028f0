"""chapters.attention.lsh.chunk_pairs: rounds are told apart by T, less than there may be buckets."""


def chunk_pairs(
    buckets: np.ndarray, chunk: int, causal: bool = True, across: bool = True
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    require_buckets(buckets, chunk)
    R, T = buckets.shape[-2:]
    labels = buckets.astype(np.int64) + T * np.arange(R)[:, None]
    order = np.argsort(labels, axis=-1, kind="stable")  # [..., R, T]
    labels = np.take_along_axis(labels, order, axis=-1)
    parts = [(r, slice(start, start + chunk)) for r in range(R) for start in range(0, T, chunk)]
    for g, (r, part) in enumerate(parts):
        reach = [(r, part), parts[g - 1]] if len(parts) > 1 else [(r, part)]
        columns, theirs = (np.concatenate([x[..., s, p] for s, p in reach], axis=-1) for x in (order, labels))
        rows, own = order[..., r, part], labels[..., r, part]
        visible = np.ones((*rows.shape, columns.shape[-1]), dtype=bool)
        if causal:
            visible &= columns[..., None, :] <= rows[..., :, None]
        if not across:
            visible &= theirs[..., None, :] == own[..., :, None]
        yield r, rows, columns, visible
