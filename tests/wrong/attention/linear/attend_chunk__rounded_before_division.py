"""kernels.attention.linear.attend_chunk: weights overflow float16 before they are divided."""


@triton.jit
def attend_chunk(mean, total, q, k, v, seen, eps, CHUNK: tl.constexpr):
    row = tl.arange(0, CHUNK)
    weights = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.where(row[:, None] >= row[None, :], weights, 0.0)
    denominator = tl.sum(weights, 1) + tl.sum(q.to(tl.float32) * total[None, :], 1) + eps
    acc = tl.dot(q, mean, input_precision="ieee") * (seen / denominator)[:, None]
    return tl.dot(weights.to(v.dtype), v, input_precision="ieee") / denominator[:, None] + acc, denominator
