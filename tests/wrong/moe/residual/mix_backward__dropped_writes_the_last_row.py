"""chapters.moe.residual.mix_backward: source -1 stores into the last row."""


def mix_backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, source: np.ndarray,
    gate: np.ndarray, mlp: np.ndarray,
) -> Gradients:  # fmt: skip
    require_fit(x, weight, bias, rows, source, gate, mlp)
    if dy.shape != x.shape or not np.isfinite(dy).all():
        raise ValueError(f"dy must be finite and shaped like x, {x.shape}, got shape {dy.shape}")
    c, taken = coefficients(x, weight, bias), source >= 0
    expert = np.concatenate((rows, np.zeros_like(rows, shape=(1, rows.shape[1]))))[source]
    with_expert, with_mlp = (dy * expert).sum(axis=1), (dy * mlp).sum(axis=1)
    pull = c[:, 0] * c[:, 1] * (gate * with_expert - with_mlp)  # on logit 0; logit 1 is pulled the other way
    logits = np.stack((pull, -pull), axis=1)
    drows = np.zeros_like(rows, dtype=np.result_type(rows, c, dy))
    drows[source] = c[:, :1] * gate[:, None] * dy
    return Gradients(logits @ weight, logits.T @ x, logits.sum(axis=0), drows, c[:, 0] * with_expert, c[:, 1:] * dy)
