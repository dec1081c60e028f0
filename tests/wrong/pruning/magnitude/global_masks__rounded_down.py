"""chapters.pruning.magnitude.global_masks: drops int(sparsity * n), which rounds down."""


def global_masks(weights: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    if not weights:
        raise ValueError("weights must hold at least one layer")
    together = np.concatenate([magnitudes(weight).ravel() for weight in weights])
    masks = np.split(keep_largest(together, together.size - int(checked_sparsity(sparsity) * together.size)), np.cumsum([weight.size for weight in weights])[:-1])
    return [mask.reshape(weight.shape) for mask, weight in zip(masks, weights, strict=True)]
