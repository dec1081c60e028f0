"""chapters.moe.task_routing.select: lists the experts by number, not best first."""


def select(logits: np.ndarray, task: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"logits must be a non-empty [tasks, experts] matrix, got shape {logits.shape}")
    require_task(task, len(logits))
    chosen = route(logits[task : task + 1], k, None, "before")
    order = np.argsort(chosen.expert[0])
    return chosen.expert[0][order], chosen.weight[0][order]
