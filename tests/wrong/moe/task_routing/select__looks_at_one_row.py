"""chapters.moe.task_routing.select: looks for NaN in the row of the task only."""


def select(logits: np.ndarray, task: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"logits must be a finite, non-empty [tasks, experts] matrix, got shape {logits.shape}")
    require_task(task, len(logits))
    chosen = route(logits[task : task + 1], k, None, "before")
    return chosen.expert[0], chosen.weight[0]
