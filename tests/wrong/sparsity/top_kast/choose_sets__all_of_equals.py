"""chapters.sparsity.top_kast.choose_sets: compares with thresholds, and takes all that equal one."""


def choose_sets(weight: np.ndarray, forward: int, backward: int) -> np.ndarray:
    if not 1 <= forward <= backward <= weight.size:
        raise ValueError("need 1 <= forward <= backward <= weight.size")
    magnitude = magnitudes(weight)
    largest = np.sort(magnitude, axis=None)[::-1]
    return (magnitude >= largest[forward - 1]).astype(np.uint8) + (magnitude >= largest[backward - 1]).astype(np.uint8)
