"""chapters.moe.task_routing.gather: multiplies up instead of down: the activation is not linear."""


def gather(
    up: np.ndarray, down: np.ndarray, expert: np.ndarray, weight: np.ndarray, gate: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    check(up.shape, down.shape, expert.shape, weight.shape, None if gate is None else gate.shape)
    if expert.min() < 0 or expert.max() >= len(up):
        raise ValueError(f"expert must be from 0 to {len(up) - 1}, got {expert.min()} to {expert.max()}")
    if not np.isfinite(weight).all():
        raise ValueError("weight must be finite, it holds NaN or infinity")
    precise = np.result_type(down, np.float32)
    scaled = down[expert].astype(precise)  # [k, dim, F]
    beside = scaled.transpose(1, 0, 2).reshape(down.shape[1], -1).astype(down.dtype)
    opens = None if gate is None else gate[expert].reshape(-1, gate.shape[2])
    return (up[expert] * weight.astype(up.dtype)[:, None, None]).reshape(-1, up.shape[2]), beside, opens
