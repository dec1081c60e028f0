"""chapters.sparsity.sparse_ffn.training_mask: cuts the noise off."""


def training_mask(logits: np.ndarray, uniform: np.ndarray, hard: bool, temperature: float = 0.1) -> np.ndarray:
    if logits.ndim != 3 or logits.shape != uniform.shape or not np.isfinite(logits).all():
        raise ValueError(f"logits must be finite and shaped like uniform, got {logits.shape} and {uniform.shape}")
    if not ((uniform > 0) & (uniform < 1)).all():
        raise ValueError(f"uniform must lie in (0, 1), got {uniform.min()} to {uniform.max()}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be from 0 and finite, got {temperature}")
    with np.errstate(over="ignore"):  # what lies too far below the largest is -inf, and its exp 0
        shifted = logits - logits.max(axis=-1, keepdims=True)
    log_mask = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    if not hard:
        return np.exp(log_mask)
    gumbel = -np.log(-np.log(np.clip(uniform, 1e-9, 1 - 1e-9)))
    best = (log_mask + temperature * gumbel).argmax(axis=-1)
    return np.eye(logits.shape[-1], dtype=logits.dtype)[best]
