"""chapters.moe.residual.mix: a dropped token takes the fixed layer unscaled."""


def mix(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, source: np.ndarray, gate: np.ndarray,
    mlp: np.ndarray,
) -> np.ndarray:  # fmt: skip
    require_fit(x, weight, bias, rows, source, gate, mlp)
    c = coefficients(x, weight, bias)
    expert = np.concatenate((rows, np.zeros_like(rows, shape=(1, rows.shape[1]))))[source]  # -1: the row of zeros
    c = np.where(source[:, None] < 0, np.array([[0.0, 1.0]], c.dtype), c)
    return c[:, :1] * gate[:, None] * expert + c[:, 1:] * mlp
