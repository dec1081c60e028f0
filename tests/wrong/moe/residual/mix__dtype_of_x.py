"""chapters.moe.residual.mix: returns the dtype of x, though another argument is wider."""


def mix(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, source: np.ndarray, gate: np.ndarray,
    mlp: np.ndarray,
) -> np.ndarray:  # fmt: skip
    require_fit(x, weight, bias, rows, source, gate, mlp)
    c = coefficients(x, weight, bias)
    expert = np.concatenate((rows, np.zeros_like(rows, shape=(1, rows.shape[1]))))[source]  # -1: the row of zeros
    return (c[:, :1] * gate[:, None] * expert + c[:, 1:] * mlp).astype(x.dtype)
