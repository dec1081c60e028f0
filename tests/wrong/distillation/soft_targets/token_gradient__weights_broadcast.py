"""chapters.distillation.soft_targets.token_gradient: one weight for all tokens is accepted."""


def token_gradient(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, norms: np.ndarray, dsoft: np.ndarray,
    dhard: np.ndarray, temperature: float = 2.0, ignore_index: int = IGNORED,
) -> np.ndarray:  # fmt: skip
    s, t, counts = checked(student, teacher, targets, temperature, ignore_index)
    if norms.shape != (3, len(s)) or dsoft.size not in (1, len(s)) or dhard.size not in (1, len(s)):
        raise ValueError(f"need norms [3, N], dsoft and dhard [N]; got {norms.shape}, {dsoft.shape} and {dhard.shape}")
    soft = np.exp(s - norms[0][:, None]) - np.exp(t - norms[1][:, None])
    hard = np.exp(student.astype(np.float64) - norms[2][:, None])
    hard[np.flatnonzero(counts), targets[counts]] -= 1
    return (temperature * dsoft)[:, None] * soft + np.where(counts, dhard, 0)[:, None] * hard
