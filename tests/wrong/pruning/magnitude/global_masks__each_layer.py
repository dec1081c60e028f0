"""chapters.pruning.magnitude.global_masks: a threshold for each layer."""


def global_masks(weights: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    if not weights:
        raise ValueError("weights must hold at least one layer")
    return [layer_mask(weight, sparsity) for weight in weights]
