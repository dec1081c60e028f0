"""chapters.attention.patterns.window: a window of 0 keys is taken."""


def window(size: int, dilation: int = 1) -> Pattern:
    return Pattern(lambda i, j: (abs(i - j) < size * dilation) & ((i - j) % dilation == 0))
