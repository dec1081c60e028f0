"""chapters.distillation.soft_targets.token_losses: exponentiates logits as they are."""


def token_losses(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, temperature: float = 2.0, ignore_index: int = IGNORED
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    s, t, counts = checked(student, teacher, targets, temperature, ignore_index)
    norms = np.log(np.exp([s, t, student.astype(np.float64)]).sum(axis=-1))  # [3, N]
    log_q, log_p = s - norms[0][:, None], t - norms[1][:, None]
    soft = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    label = np.take_along_axis(student, np.where(counts, targets, 0)[:, None], axis=1)[:, 0]
    return soft, np.where(counts, norms[2] - label, 0), norms
