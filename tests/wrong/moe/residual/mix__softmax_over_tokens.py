"""chapters.moe.residual.mix: lets the tokens compete instead of the two branches."""


def mix(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, source: np.ndarray, gate: np.ndarray,
    mlp: np.ndarray,
) -> np.ndarray:  # fmt: skip
    require_fit(x, weight, bias, rows, source, gate, mlp)
    logits = x @ weight.T + bias
    c = np.exp(logits - logits.max(axis=0))
    c = c / c.sum(axis=0)
    expert = np.concatenate((rows, np.zeros_like(rows, shape=(1, rows.shape[1]))))[source]  # -1: the row of zeros
    return c[:, :1] * gate[:, None] * expert + c[:, 1:] * mlp
