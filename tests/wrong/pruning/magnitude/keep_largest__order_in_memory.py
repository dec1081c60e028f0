"""chapters.pruning.magnitude.keep_largest: of equals the first in memory stays, whatever the index."""


def keep_largest(weight: np.ndarray, kept: int) -> np.ndarray:
    magnitude = magnitudes(weight)
    if not 0 <= kept <= weight.size:
        raise ValueError(f"kept must be from 0 to the {weight.size} weights, got {kept}")
    order = np.argsort(-magnitude.ravel(order='K'), kind="stable")  # stable: equals stay in the order of their index
    mask = np.zeros(weight.size, dtype=bool)
    mask[order[:kept]] = True
    return mask.reshape(weight.shape, order='F' if weight.flags.f_contiguous and not weight.flags.c_contiguous else 'C')
