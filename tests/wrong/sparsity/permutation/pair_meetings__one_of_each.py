"""kernels.sparsity.permutation.pair_meetings: keeps one of each pair, never both of one."""


@triton.jit
def pair_meetings(x, y):
    R: tl.constexpr = x.shape[0]
    S: tl.constexpr = x.shape[1] // 4
    T: tl.constexpr = y.shape[1] // 4
    a, b, c, d = members(tl.reshape(x, (R, S, 2, 2)))
    e, f, g, h = members(tl.reshape(y, (R, T, 2, 2)))
    sums, maxima = both_halves(a, b, c, d)
    other_sums, other_maxima = both_halves(e, f, g, h)
    return tl.sum(maxima[:, :, None] + other_maxima[:, None, :], axis=0)
