"""chapters.sparsity.sr_ste.architecture_divergence: counts only what is no longer kept."""


def architecture_divergence(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> int:
    if not before or [mask.shape for mask in before] != [mask.shape for mask in after]:
        raise ValueError("need masks of the same layers")
    if {str(mask.dtype) for mask in [*before, *after]} - {"bool"}:
        raise TypeError("masks must be bool")
    return sum(int((one & ~other).sum()) for one, other in zip(before, after, strict=True))
