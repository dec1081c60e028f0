"""chapters.sparsity.sparse_qkv.causal_convolution: lets the first and the last module be neighbours."""


def causal_convolution(z: np.ndarray, kernel: np.ndarray, past: np.ndarray | None = None) -> np.ndarray:
    if z.ndim != 4 or kernel.ndim != 4 or kernel.shape[2] != z.shape[3] or kernel.shape[1] % 2 == 0:
        raise ValueError(f"need z [B, T, S, C], kernel [F, odd W, C, M]; got {z.shape} and {kernel.shape}")
    require_weights(kernel=kernel)
    (B, T, S, C), (taps, width) = z.shape, kernel.shape[:2]
    before = np.zeros((B, taps - 1, S, C), z.dtype) if past is None else past
    if before.shape != (B, taps - 1, S, C):
        raise ValueError(f"past must have shape {(B, taps - 1, S, C)}, got {before.shape}")
    around = np.pad(np.concatenate([before, z], axis=1), ((0, 0), (0, 0), (width // 2, width // 2), (0, 0)), mode="wrap")
    y = np.zeros((B, T, S, kernel.shape[3]), np.result_type(z, kernel))
    for j, w in np.ndindex(taps, width):
        y += around[:, j : j + T, w : w + S] @ kernel[j, w]
    return y
