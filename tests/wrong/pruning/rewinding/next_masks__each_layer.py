"""chapters.pruning.rewinding.next_masks: prunes each layer by its own threshold."""


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
    np.concatenate([magnitudes(weight).ravel() for weight in weights])
    share = kept / left.sum()
    found = [mask.copy() for mask in masks]
    for weight, mask in zip(weights, found, strict=True):
        mask[mask] = keep_largest(weight[mask], round(share * mask.sum())) if mask.any() else False
    return found
