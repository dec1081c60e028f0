"""chapters.moe.routing.queue: load ends with the last expert that anyone chose."""


def queue(
    expert: np.ndarray, experts: int, by: By = "choice", arrival: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    tokens, k = expert.shape
    if expert.size and not 0 <= expert.min() <= expert.max() < experts:
        raise ValueError(f"expert must be from 0 to {experts - 1}, got {expert.min()} to {expert.max()}")
    if by not in ("choice", "token"):
        raise ValueError(f'by must be "choice" or "token", got {by!r}')
    order = np.arange(tokens) if arrival is None else np.asarray(arrival)
    if order.shape != (tokens,) or (np.sort(order) != np.arange(tokens)).any():
        raise ValueError(f"arrival must list each of the {tokens} tokens once, got shape {order.shape}")
    line = np.arange(expert.size).reshape(tokens, k)[order]  # who is served when: indices into expert.ravel()
    line = (line.T if by == "choice" else line).ravel()
    chosen = expert.ravel()[line]
    load = np.bincount(chosen)
    grouped = line[np.argsort(chosen, kind="stable")]  # expert by expert, each in the order of service
    slot = np.empty(expert.size, np.int64)
    slot[grouped] = np.arange(expert.size) - np.repeat(np.cumsum(load) - load, load)
    return slot.reshape(tokens, k), load
