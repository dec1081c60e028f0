"""chapters.pruning.rewinding.next_masks: takes dropped weights for zeros, which tie with zeros that are kept."""


def next_masks(weights: Sequence[np.ndarray], masks: Sequence[np.ndarray], kept: int) -> list[np.ndarray]:
    if not weights or [w.shape for w in weights] != [mask.shape for mask in masks]:
        raise ValueError(f"masks must be shaped like weights, {[w.shape for w in weights]}, got "
                         f"{[mask.shape for mask in masks]}")  # fmt: skip
    for mask in masks:
        if mask.dtype != bool:
            raise TypeError(f"masks must be bool, got {mask.dtype}")
    left = np.concatenate([mask.ravel() for mask in masks])
    if not 1 <= kept <= left.sum():
        raise ValueError(f"kept must be from 1 to the {left.sum()} weights that are left, got {kept}")
    together = np.concatenate([magnitudes(weight).ravel() for weight in weights])
    left = keep_largest(together * left, kept)
    parts = np.split(left, np.cumsum([weight.size for weight in weights])[:-1])
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]
