"""kernels.pruning.wanda.group_stays: treats eight as twice four."""


@triton.jit
def group_stays(key, n, M: tl.constexpr):
    R: tl.constexpr = key.shape[0]
    C: tl.constexpr = key.shape[1]
    if M == 2:
        a, b = tl.split(tl.reshape(key, (R, C // 2, 2)))
        keep = tl.join(beaten((a, b), 0, 2), beaten((a, b), 1, 2)) < n
    elif M >= 4:
        four = members(tl.reshape(key, (R, C // 4, 2, 2)))
        keep = join_four(beaten(four, 0, 4), beaten(four, 1, 4), beaten(four, 2, 4), beaten(four, 3, 4)) < n
    return tl.reshape(keep, (R, C))
