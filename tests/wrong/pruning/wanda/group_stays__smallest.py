"""kernels.pruning.wanda.group_stays: keeps the smallest."""


@triton.jit
def group_stays(key, n, M: tl.constexpr):
    key = -key
    R: tl.constexpr = key.shape[0]
    C: tl.constexpr = key.shape[1]
    if M == 2:
        a, b = tl.split(tl.reshape(key, (R, C // 2, 2)))
        keep = tl.join(beaten((a, b), 0, 2), beaten((a, b), 1, 2)) < n
    elif M == 4:
        four = members(tl.reshape(key, (R, C // 4, 2, 2)))
        keep = join_four(beaten(four, 0, 4), beaten(four, 1, 4), beaten(four, 2, 4), beaten(four, 3, 4)) < n
    else:
        even, odd = tl.split(tl.reshape(key, (R, C // 8, 2, 2, 2)))
        a, c, e, g = members(even)
        b, d, f, h = members(odd)
        keys = (a, b, c, d, e, f, g, h)
        even = join_four(beaten(keys, 0, 8), beaten(keys, 2, 8), beaten(keys, 4, 8), beaten(keys, 6, 8))
        odd = join_four(beaten(keys, 1, 8), beaten(keys, 3, 8), beaten(keys, 5, 8), beaten(keys, 7, 8))
        keep = tl.join(even, odd) < n
    return tl.reshape(keep, (R, C))
