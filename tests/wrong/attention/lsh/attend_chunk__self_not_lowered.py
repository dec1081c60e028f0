"""kernels.attention.lsh.attend_chunk: a token's score with itself is not lowered."""


@triton.jit
def attend_chunk(maximum, total, acc, q, k, v, row, column, live, lower, scale2, CAUSAL: tl.constexpr):
    length = tl.sqrt(tl.sum(k.to(tl.float32) * k.to(tl.float32), 1))
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale2 / tl.maximum(length, SHORTEST))[None, :]
    scores = tl.where(row[:, None] == column[None, :], SELF2, scores - lower)
    if CAUSAL:
        live = live & (column[None, :] <= row[:, None])
    scores = tl.where(live, scores, -INFINITY)
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    finite = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)
    weights = tl.exp2(scores - finite[:, None])
    rescale = tl.exp2(maximum - finite)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return new_maximum, total * rescale + tl.sum(weights, 1), acc
