"""chapters.sparsity.top_kast.refresh: starts all moments from 0."""


def refresh(
    theta: np.ndarray, index: np.ndarray, values: np.ndarray, moments: np.ndarray,
    choose: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    inside = index.size == 0 or (index[0] >= 0 and index[-1] < theta.size and (np.diff(index) > 0).all())
    if not inside or not index.shape == values.shape == moments.shape[1:]:
        raise ValueError("index must rise within theta, one for each of values")
    theta = theta.copy()
    theta.reshape(-1)[index] = values
    member = choose(theta).reshape(-1)
    chosen = np.flatnonzero(member)
    place = np.searchsorted(index, chosen)
    stays = np.append(index, -1)[place] == chosen
    carried = np.zeros((len(moments), chosen.size)).astype(moments.dtype)
    return theta, chosen, theta.reshape(-1)[chosen], member[chosen] == 2, carried
