"""chapters.pruning.magnitude.global_masks: joins the layers backwards, so that of equals the later layer keeps its own."""


def global_masks(weights: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    if not weights:
        raise ValueError("weights must hold at least one layer")
    together = np.concatenate([magnitudes(weight).ravel() for weight in weights[::-1]])
    masks = np.split(layer_mask(together, sparsity), np.cumsum([weight.size for weight in weights[::-1]])[:-1])
    return [mask.reshape(weight.shape) for mask, weight in zip(masks[::-1], weights, strict=True)]
