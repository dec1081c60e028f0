"""chapters.pruning.rewinding.retraining_rates: learning-rate rewinding rewinds the weights, too."""


def retraining_rates(
    method: str, rates: np.ndarray, replayed: int, constant: float | None = None
) -> tuple[int, np.ndarray]:  # fmt: skip
    rates = np.array(rates, dtype=np.float64)
    if rates.ndim != 1 or rates.size == 0 or not (np.isfinite(rates).all() and (rates > 0).all()):
        raise ValueError(f"rates must be [T], positive and finite, got shape {rates.shape}, {rates}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 1 <= replayed <= rates.size:
        raise ValueError(f"replayed must be from 1 to the {rates.size} steps of the first run, got {replayed}")
    if method == "lottery":
        return 0, rates
    if method == "fine-tuning":
        last = float(rates[-1] if constant is None else constant)
        if not 0 < last < math.inf:
            raise ValueError(f"constant must be positive and finite, got {constant}")
        return rates.size, np.full(replayed, last)
    start = rates.size - replayed
    return start, rates[start:]
