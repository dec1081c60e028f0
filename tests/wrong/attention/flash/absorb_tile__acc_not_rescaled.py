"""chapters.attention.flash.absorb_tile: the sum of values still rests on the old maximum."""


def absorb_tile(
    maximum: np.ndarray, total: np.ndarray, acc: np.ndarray, scores: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    new_maximum = np.maximum(maximum, scores.max(axis=-1, keepdims=True))
    weights = np.exp(scores - finite(new_maximum))
    rescale = np.exp(maximum - finite(new_maximum))
    return new_maximum, rescale * total + weights.sum(axis=-1, keepdims=True), acc + weights @ values
