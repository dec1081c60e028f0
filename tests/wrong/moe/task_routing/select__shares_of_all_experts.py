"""chapters.moe.task_routing.select: weights are shares of all experts, and do not sum to 1."""


def select(logits: np.ndarray, task: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"logits must be a non-empty [tasks, experts] matrix, got shape {logits.shape}")
    require_task(task, len(logits))
    chosen = route(logits[task : task + 1], k, None, "never")
    return chosen.expert[0], chosen.weight[0]
