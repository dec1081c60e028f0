"""chapters.moe.routing.balance_loss: takes k = 0, which divides by 0."""


def balance_loss(p: np.ndarray, expert: np.ndarray) -> float:
    if p.ndim != 2 or expert.ndim != 2 or len(p) != len(expert) or len(p) == 0:
        raise ValueError(f"p and expert must have a row for each token, got shapes {p.shape} and {expert.shape}")
    share = np.bincount(expert.ravel(), minlength=p.shape[1]) / expert.size
    return float(p.shape[1] * (share * p.mean(axis=0)).sum())
