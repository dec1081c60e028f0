"""chapters.sparsity.top_kast.choose_sets: keeps the sign, so that large negative weights rank lowest."""


def choose_sets(weight: np.ndarray, forward: int, backward: int) -> np.ndarray:
    if not 1 <= forward <= backward <= weight.size:
        raise ValueError("need 1 <= forward <= backward <= weight.size")
    order = np.argsort(-magnitudes(weight) * np.sign(weight), axis=None, kind="stable")
    member = np.zeros(weight.size, dtype=np.uint8)
    member[order[:backward]] = 1
    member[order[:forward]] = 2
    return member.reshape(weight.shape)
