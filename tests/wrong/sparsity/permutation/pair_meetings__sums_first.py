"""kernels.sparsity.permutation.pair_meetings: sums over the rows before it chooses."""


@triton.jit
def pair_meetings(x, y):
    R: tl.constexpr = x.shape[0]
    S: tl.constexpr = x.shape[1] // 4
    T: tl.constexpr = y.shape[1] // 4
    a, b, c, d = members(tl.reshape(x, (R, S, 2, 2)))
    e, f, g, h = members(tl.reshape(y, (R, T, 2, 2)))
    sums, maxima = both_halves(a, b, c, d)
    other_sums, other_maxima = both_halves(e, f, g, h)
    first, other = tl.sum(sums, axis=0), tl.sum(other_sums, axis=0)
    both = tl.sum(maxima, axis=0)[:, None] + tl.sum(other_maxima, axis=0)[None, :]
    return tl.maximum(tl.maximum(first[:, None], other[None, :]), both)
