"""kernels.sparsity.sparse_ffn.choose: gives places beyond N a finite logit."""


@triton.jit
def choose(low, second, bias, block, live, N, R, WIDTH: tl.constexpr, RANK: tl.constexpr):
    place, rank = tl.arange(0, WIDTH), tl.arange(0, RANK)
    unit = block[:, None] * N + place[None, :]  # [B, WIDTH]
    there = live[:, None] & (place < N)[None, :]
    inside = there[:, :, None] & (rank < R)[None, None, :]
    tile = tl.load(second + unit[:, :, None] * R + rank[None, None, :], mask=inside, other=0.0).to(tl.float32)
    vector = tl.load(low + rank, mask=rank < R, other=0.0)
    logits = tl.sum(tile * vector[None, None, :], axis=2)
    logits += tl.load(bias + unit, mask=there, other=0.0).to(tl.float32)
    best = tl.argmax(tl.where((place < N)[None, :], logits, -1e6), axis=1)
    return tl.minimum(best, N - 1).to(tl.int32)
