"""chapters.sparsity.top_kast.choose_sets: takes `backward` as the weights of B beyond A."""


def choose_sets(weight: np.ndarray, forward: int, backward: int) -> np.ndarray:
    if not 1 <= forward <= backward <= weight.size:
        raise ValueError("need 1 <= forward <= backward <= weight.size")
    order = np.argsort(-magnitudes(weight), axis=None, kind="stable")
    member = np.zeros(weight.size, dtype=np.uint8)
    member[order[: forward + backward]] = 1
    member[order[:forward]] = 2
    return member.reshape(weight.shape)
