"""chapters.moe.task_routing.mixture: takes the task of the first row for all."""


def mixture(
    x: np.ndarray, task: np.ndarray, expert: np.ndarray, weight: np.ndarray,
    up: np.ndarray, down: np.ndarray, gate: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    if task.shape != x.shape[:1]:
        raise ValueError(f"task must have one number for each of the {len(x)} rows of x, got shape {task.shape}")
    out = np.zeros_like(x)
    for one in task[:1]:
        require_task(one, len(expert))
        rows = slice(None)
        for e, w in zip(expert[one], weight[one], strict=True):
            out[rows] += (w * dense(x[rows], up[e], down[e], None if gate is None else gate[e])).astype(x.dtype)
    return out
