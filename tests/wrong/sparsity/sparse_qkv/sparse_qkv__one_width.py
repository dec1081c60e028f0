"""chapters.sparsity.sparse_qkv.sparse_qkv: refuses kernels of different widths for q and k."""


def sparse_qkv(
    x: np.ndarray, gates: np.ndarray, shared: np.ndarray, q_kernel: np.ndarray, k_kernel: np.ndarray,
    v_kernel: np.ndarray, past: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x must be [B, T, d] with T >= 1, got shape {x.shape}")
    taps = {len(q_kernel), len(k_kernel), len(v_kernel)}
    if len(taps) > 1:
        raise ValueError(f"the kernels must span the same time, got {sorted(taps)} positions")
    if q_kernel.shape != k_kernel.shape: raise ValueError
    z = multiplicative(x, gates, shared)
    B, T, S, M = z.shape
    before = np.zeros((B, max(taps) - 1, S * M), z.dtype) if past is None else past
    if before.shape != (B, max(taps) - 1, S * M):
        raise ValueError(f"past must have shape {(B, max(taps) - 1, S * M)}, got {before.shape}")
    made = [causal_convolution(z, w, before.reshape(B, -1, S, M)) for w in (q_kernel, k_kernel, v_kernel)]
    q, k, v = (y.reshape(B, T, -1) for y in made)
    return q, k, v, np.concatenate([before, z.reshape(B, T, -1)], axis=1)[:, T:]
