"""chapters.distillation.soft_targets.cosine_losses: takes states [B, T, C]."""


def cosine_losses(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(f"hidden states must be [N, C] of one shape, got {student.shape} and {teacher.shape}")
    a, b = student.astype(np.float64), teacher.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("hidden states must be finite")
    lengths = np.sqrt((a**2).sum(axis=-1) + 1e-12) * np.sqrt((b**2).sum(axis=-1) + 1e-12)
    return 1 - (a * b).sum(axis=-1) / lengths
