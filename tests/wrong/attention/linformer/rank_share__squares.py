"""chapters.attention.linformer.rank_share: the share of the squares of the singular values."""


def rank_share(weights: np.ndarray, rank: int) -> np.ndarray:
    if weights.ndim < 2 or not 1 <= rank <= min(weights.shape[-2:]):
        raise ValueError(f"rank must be from 1 to the smaller side of [..., T, S], got {rank} for {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError("weights must be finite")
    values = np.linalg.svd(weights, compute_uv=False)  # falling
    values = values**2
    total = values.sum(axis=-1)
    return np.where(total > 0, values[..., :rank].sum(axis=-1) / np.where(total > 0, total, 1), 1)
