"""chapters.attention.patterns.window: counts `size` keys besides the query's own, as flash-attn does."""


def window(size: int, dilation: int = 1) -> Pattern:
    at_least(1, size=size, dilation=dilation)
    return Pattern(lambda i, j: (abs(i - j) <= size * dilation) & ((i - j) % dilation == 0))
