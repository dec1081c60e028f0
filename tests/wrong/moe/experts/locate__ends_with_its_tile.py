"""kernels.moe.experts.locate: a group ends where its whole tiles end."""


@triton.jit
def locate(begin, end, tile, columns, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    tiles = tl.cdiv(end - begin, BLOCK_M) * columns
    after = tl.cumsum(tiles, axis=0)  # number of the first tile beyond each group
    group = tl.sum((after <= tile).to(tl.int32), axis=0)
    mine = tl.arange(0, WIDTH) == group
    first = tl.sum(tl.where(mine, begin, 0), axis=0)
    stop = first + tl.cdiv(tl.sum(tl.where(mine, end, 0), axis=0) - first, BLOCK_M) * BLOCK_M
    within = tile - tl.sum(tl.where(mine, after - tiles, 0), axis=0)
    band = within // (GROUP * columns)
    place = within % (GROUP * columns)
    height = tl.minimum(GROUP, tl.cdiv(stop - first, BLOCK_M) - band * GROUP)
    return group, first + (band * GROUP + place % height) * BLOCK_M, stop, place // height
