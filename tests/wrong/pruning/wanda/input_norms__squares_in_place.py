"""chapters.pruning.wanda.input_norms: squares a float64 batch in place."""


def input_norms(batches: Iterable[np.ndarray]) -> np.ndarray:
    total, samples, tokens = 0.0, 0, 0
    for batch in batches:
        x = np.asarray(batch, dtype=np.float64).reshape(-1, batch.shape[-1])  # [tokens, in]
        samples, tokens = samples + (len(batch) if batch.ndim == 3 else 1), tokens + len(x)
        x **= 2
        total = total + x.sum(axis=0)
    if tokens == 0 or not np.isfinite(total).all():
        raise ValueError(f"batches must hold finite numbers and at least one token, got {tokens} tokens")
    return np.sqrt(total / samples)
