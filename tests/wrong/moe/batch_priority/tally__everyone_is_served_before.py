"""kernels.moe.batch_priority.tally: counts all that chose the expert, whatever their score."""


@triton.jit
def tally(
    score, expert, token, mine, which, start, stop, SIDE: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    ahead = tl.zeros((BLOCK, CHUNK), tl.int32)
    same = tl.zeros((BLOCK, CHUNK), tl.int32)
    for first in range(start, stop, CHUNK):
        other = first + tl.arange(0, CHUNK)
        there = other < stop
        value = read_scores(score, other, there)[None, :]
        if SIDE < 0:
            before = value >= mine[:, None]
        elif SIDE > 0:
            before = value > mine[:, None]
        else:
            before = (value > mine[:, None]) | ((value == mine[:, None]) & (other[None, :] < token[:, None]))
        wanted = tl.load(expert + other * K + J, mask=there, other=-1)
        ahead += before.to(tl.int32)
        same += (wanted[None, :] == which[:, None]).to(tl.int32)
        for earlier in tl.static_range(J):
            wanted = tl.load(expert + other * K + earlier, mask=there, other=-1)
            same += (wanted[None, :] == which[:, None]).to(tl.int32)
    return tl.sum(ahead, axis=1), tl.sum(same, axis=1)
