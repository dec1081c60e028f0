"""chapters.attention.flash.absorb_tile: a row without any visible key gets −inf − −inf, which is NaN."""


def absorb_tile(
    maximum: np.ndarray, total: np.ndarray, acc: np.ndarray, scores: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    new_maximum = np.maximum(maximum, scores.max(axis=-1, keepdims=True))
    weights = np.exp(scores - new_maximum)
    rescale = np.exp(maximum - new_maximum)
    return new_maximum, rescale * total + weights.sum(axis=-1, keepdims=True), rescale * acc + weights @ values
