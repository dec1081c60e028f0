"""chapters.pruning.magnitude.global_masks: compares each layer with the common threshold, which keeps all of equals."""


def global_masks(weights: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    if not weights:
        raise ValueError("weights must hold at least one layer")
    together = np.concatenate([magnitudes(weight).ravel() for weight in weights])
    least = np.sort(together)[dropped(together.size, sparsity)]
    return [magnitudes(weight) >= least for weight in weights]
