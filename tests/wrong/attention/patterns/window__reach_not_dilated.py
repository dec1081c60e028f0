"""chapters.attention.patterns.window: `size` counts positions, not keys."""


def window(size: int, dilation: int = 1) -> Pattern:
    at_least(1, size=size, dilation=dilation)
    return Pattern(lambda i, j: (abs(i - j) < size) & ((i - j) % dilation == 0))
