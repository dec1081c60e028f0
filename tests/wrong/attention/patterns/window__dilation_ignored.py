"""chapters.attention.patterns.window: every position of the stretch is seen."""


def window(size: int, dilation: int = 1) -> Pattern:
    at_least(1, size=size, dilation=dilation)
    return Pattern(lambda i, j: (abs(i - j) < size * dilation))
