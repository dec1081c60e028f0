"""kernels.sparsity.sr_ste.kept: meets only the first half of its partners."""


@triton.jit
def kept(key, N: tl.constexpr, M: tl.constexpr):
    place = tl.broadcast_to(tl.arange(0, M)[None, :], key.shape)
    rank = tl.zeros(key.shape, tl.int32)
    other = key
    for turn in tl.static_range(1, M // 2):
        other = swapped(other, M, turn & -turn)
        later = (place ^ turn ^ (turn >> 1)) > place
        rank += ((other > key) | ((other == key) & later)).to(tl.int32)
    return rank < N
