"""chapters.distillation.divergences.mixture_terms: raises e to whatever comes."""


def mixture_terms(log_a: np.ndarray, log_b: np.ndarray, weight: float, rest: float) -> np.ndarray:
    a, away = np.exp(log_a), log_b - log_a
    if weight == 0:
        return a - np.exp(log_b)
    reach = math.log(weight) + away  # log of w b / a
    if weight < 0.5:  # log(m / a) = log(1 + w (b / a − 1)), near 0 where w is
        near = np.log1p(weight * np.expm1(away))
        return -a * near / weight
    return -a * np.logaddexp(math.log(rest) if rest > 0 else -math.inf, reach) / weight
