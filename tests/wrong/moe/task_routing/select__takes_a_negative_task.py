"""chapters.moe.task_routing.select: counts negative tasks from the end."""


def select(logits: np.ndarray, task: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"logits must be a non-empty [tasks, experts] matrix, got shape {logits.shape}")
    if task >= len(logits):
        raise ValueError(f"there is no task {task}")
    chosen = route(logits[task][None], k, None, "before")
    return chosen.expert[0], chosen.weight[0]
