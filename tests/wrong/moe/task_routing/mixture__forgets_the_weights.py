"""chapters.moe.task_routing.mixture: adds the experts without their weights."""


def mixture(
    x: np.ndarray, task: np.ndarray, expert: np.ndarray, weight: np.ndarray,
    up: np.ndarray, down: np.ndarray, gate: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    if task.shape != x.shape[:1]:
        raise ValueError(f"task must have one number for each of the {len(x)} rows of x, got shape {task.shape}")
    out = np.zeros_like(x)
    for one in np.unique(task):
        require_task(one, len(expert))
        rows = task == one
        for e, w in zip(expert[one], weight[one], strict=True):
            out[rows] += (dense(x[rows], up[e], down[e], None if gate is None else gate[e])).astype(x.dtype)
    return out
