"""chapters.moe.routing.balance_loss: returns an array."""


def balance_loss(p: np.ndarray, expert: np.ndarray) -> float:
    if p.ndim != 2 or expert.ndim != 2 or len(p) != len(expert) or expert.size == 0:
        raise ValueError(f"p and expert must have a row for each token, got shapes {p.shape} and {expert.shape}")
    share = np.bincount(expert.ravel(), minlength=p.shape[1]) / expert.size
    return p.shape[1] * (share * p.mean(axis=0)).sum(keepdims=True)
