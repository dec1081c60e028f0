"""chapters.sparsity.sparse_qkv.multiplicative: computes in float64 whatever it is given."""


def multiplicative(x: np.ndarray, gates: np.ndarray, shared: np.ndarray) -> np.ndarray:
    if gates.ndim != 2 or shared.ndim != 2 or x.ndim < 1 or not x.shape[-1] == gates.shape[1] == shared.shape[0]:
        raise ValueError(f"need x [.., d], gates [S, d], shared [d, M]; got {x.shape}, {gates.shape}, {shared.shape}")
    require_weights(gates=gates, shared=shared)
    return (x[..., None, :].astype(float) * gates) @ shared
