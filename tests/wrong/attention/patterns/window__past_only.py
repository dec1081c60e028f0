"""chapters.attention.patterns.window: a causal window, although that is for the caller to cut."""


def window(size: int, dilation: int = 1) -> Pattern:
    at_least(1, size=size, dilation=dilation)
    return Pattern(lambda i, j: (i - j >= 0) & (i - j < size * dilation) & ((i - j) % dilation == 0))
