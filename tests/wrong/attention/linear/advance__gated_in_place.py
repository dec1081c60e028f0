"""chapters.attention.linear.advance: forgets in the given state."""


def advance(
    state: State, q: np.ndarray, k: np.ndarray, v: np.ndarray, eps: float = EPS, gate: np.ndarray | None = None
) -> tuple[np.ndarray, State]:
    keep, add = (np.ones_like(q[..., :1]),) * 2 if gate is None else (gate[..., None], 1 - gate[..., None])
    z = keep * state.z + add * k
    state.S[...] *= keep[..., None]
    S = state.S + add[..., None] * (k[..., :, None] * v[..., None, :])
    total = (q * z).sum(axis=-1, keepdims=True) + eps
    return (q[..., None, :] @ S)[..., 0, :] / total, State(S, z)
