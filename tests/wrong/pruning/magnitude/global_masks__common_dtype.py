"""chapters.pruning.magnitude.global_masks: joins the weights before it takes magnitudes, in the dtype of the first."""


def global_masks(weights: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    if not weights:
        raise ValueError("weights must hold at least one layer")
    for weight in weights:
        magnitudes(weight)
    together = np.concatenate([weight.ravel().astype(weights[0].dtype) for weight in weights])
    masks = np.split(layer_mask(together, sparsity), np.cumsum([weight.size for weight in weights])[:-1])
    return [mask.reshape(weight.shape) for mask, weight in zip(masks, weights, strict=True)]
