"""chapters.sparsity.top_kast.choose_sets: numbers weights as they lie in memory."""


def choose_sets(weight: np.ndarray, forward: int, backward: int) -> np.ndarray:
    if not 1 <= forward <= backward <= weight.size:
        raise ValueError(f"need 1 <= forward <= backward <= {weight.size} weights, got {forward} and {backward}")
    order = np.argsort(-magnitudes(weight).ravel(order='K'), kind="stable")  # stable: equals stay in the order of their index
    member = np.zeros(weight.size, dtype=np.uint8)
    member[order[:backward]] = 1
    member[order[:forward]] = 2
    return member.reshape(weight.shape)
