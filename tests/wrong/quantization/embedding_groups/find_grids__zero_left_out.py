"""chapters.quantization.embedding_groups.find_grids: does not widen the range to hold 0."""


def find_grids(
    low: np.ndarray, high: np.ndarray, order: np.ndarray, groups: int, bits: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    if bits not in range(1, 9):
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    if groups < 1 or len(order) % groups:
        raise ValueError(f"groups must divide the {len(order)} channels, got {groups}")
    if not (low <= high).all():
        raise ValueError("low must not exceed high in any channel")
    low = low[order].reshape(groups, -1).min(axis=1)
    high = high[order].reshape(groups, -1).max(axis=1)
    highest = 2**bits - 1
    scale = np.maximum((high - low) / highest, low.dtype.type(1e-8))
    if not np.isfinite(scale).all():
        raise ValueError("low and high must be finite, and so must the range of a group")
    return scale, np.clip(np.rint(-low / scale), 0, highest)
