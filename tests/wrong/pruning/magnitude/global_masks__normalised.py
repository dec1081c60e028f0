"""chapters.pruning.magnitude.global_masks: divides by the largest magnitude of each layer first."""


def global_masks(weights: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    if not weights:
        raise ValueError("weights must hold at least one layer")
    together = np.concatenate([(magnitudes(weight) / max(magnitudes(weight).max(), 1e-30)).ravel() for weight in weights])
    masks = np.split(layer_mask(together, sparsity), np.cumsum([weight.size for weight in weights])[:-1])
    return [mask.reshape(weight.shape) for mask, weight in zip(masks, weights, strict=True)]
