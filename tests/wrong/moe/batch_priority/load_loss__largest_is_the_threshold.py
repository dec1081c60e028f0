"""chapters.moe.batch_priority.load_loss: forgets that k experts are chosen."""


def load_loss(logits: np.ndarray, noisy: np.ndarray, k: int, std: float, correction: int = 0) -> float:
    if logits.shape != noisy.shape or logits.ndim != 2 or logits.size == 0 or logits.shape[1] <= correction:
        raise ValueError(f"logits and noisy must be matrices of one shape, got {logits.shape} and {noisy.shape}")
    if not (np.isfinite(logits).all() and np.isfinite(noisy).all()):
        raise ValueError("logits and noisy must be finite, they hold NaN or infinity")
    if not 1 <= k <= logits.shape[1] or not 0 < std < math.inf:
        raise ValueError(f"need k from 1 to {logits.shape[1]} and a positive, finite std, got {k=} and {std=}")
    threshold = np.sort(noisy.astype(np.float64), axis=1)[:, -1, None]
    missing = (threshold - logits) / (std * math.sqrt(2))
    chance = np.vectorize(math.erfc, otypes=[np.float64])(missing) / 2
    return spread(chance.sum(axis=0), correction)
