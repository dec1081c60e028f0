"""chapters.attention.flash.absorb_tile: exponentials of the plain scores overflow; the maximum is only reported."""


def absorb_tile(
    maximum: np.ndarray, total: np.ndarray, acc: np.ndarray, scores: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    new_maximum = np.maximum(maximum, scores.max(axis=-1, keepdims=True))
    weights = np.exp(scores)
    total = np.exp(maximum) * total + weights.sum(axis=-1, keepdims=True)
    return new_maximum, total / np.exp(new_maximum), (np.exp(maximum) * acc + weights @ values) / np.exp(new_maximum)
