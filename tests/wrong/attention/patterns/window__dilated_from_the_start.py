"""chapters.attention.patterns.window: takes every dilation-th position of the text instead of counting from the query."""


def window(size: int, dilation: int = 1) -> Pattern:
    at_least(1, size=size, dilation=dilation)
    return Pattern(lambda i, j: (abs(i - j) < size * dilation) & (j % dilation == 0))
