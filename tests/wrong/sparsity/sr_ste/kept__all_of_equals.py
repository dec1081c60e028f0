"""kernels.sparsity.sr_ste.kept: keeps all that are equal to the last."""


@triton.jit
def kept(key, N: tl.constexpr, M: tl.constexpr):
    place = tl.broadcast_to(tl.arange(0, M)[None, :], key.shape)
    rank = tl.zeros(key.shape, tl.int32)
    other = key
    for turn in tl.static_range(1, M):
        other = swapped(other, M, turn & -turn)
        rank += (other > key).to(tl.int32)
    return rank < N
