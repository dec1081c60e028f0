"""chapters.quantization.mixed_precision.hutchinson: draws one probe and repeats it."""


def hutchinson(product: Product, size: int, probes: int, seed: int = 0) -> np.ndarray:
    if size < 1 or probes < 1:
        raise ValueError(f"size and probes must be at least 1, got {size} and {probes}")
    signs = np.tile(np.random.default_rng(seed).choice([-1.0, 1.0], size=size), (probes, 1))
    return np.array([v @ product(v) for v in signs])
