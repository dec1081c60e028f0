"""chapters.quantization.mixed_precision.hutchinson: estimates the mean eigenvalue."""


def hutchinson(product: Product, size: int, probes: int, seed: int = 0) -> np.ndarray:
    if size < 1 or probes < 1:
        raise ValueError(f"size and probes must be at least 1, got {size} and {probes}")
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(probes, size))
    return np.array([v @ product(v) / size for v in signs])
