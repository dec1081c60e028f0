"""chapters.pruning.magnitude.global_masks: compares in float32."""


def global_masks(weights: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    if not weights:
        raise ValueError("weights must hold at least one layer")
    together = np.concatenate([magnitudes(weight).ravel().astype(np.float32) for weight in weights])
    masks = np.split(layer_mask(together, sparsity), np.cumsum([weight.size for weight in weights])[:-1])
    return [mask.reshape(weight.shape) for mask, weight in zip(masks, weights, strict=True)]
