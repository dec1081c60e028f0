"""chapters.sparsity.top_kast.refresh: returns places in int32."""


def refresh(
    theta: np.ndarray, index: np.ndarray, values: np.ndarray, moments: np.ndarray,
    choose: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    inside = index.size == 0 or (index[0] >= 0 and index[-1] < theta.size and (np.diff(index) > 0).all())
    if not inside or not index.shape == values.shape == moments.shape[1:]:
        raise ValueError(f"index must rise within {theta.size} weights, one for each of values {values.shape}")
    theta = theta.copy()
    theta.reshape(-1)[index] = values
    member = choose(theta).reshape(-1)
    chosen = np.flatnonzero(member)
    place = np.searchsorted(index, chosen)
    stays = np.append(index, -1)[place] == chosen  # past the last: no place at all
    carried = np.where(stays, np.pad(moments, ((0, 0), (0, 1)))[:, place], 0).astype(moments.dtype)
    return theta, chosen.astype(np.int32), theta.reshape(-1)[chosen], member[chosen] == 2, carried
