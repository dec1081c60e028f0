"""kernels.attention.linear.attend_chunk: leaves eps out."""


@triton.jit
def attend_chunk(mean, total, q, k, v, seen, eps, CHUNK: tl.constexpr):
    row = tl.arange(0, CHUNK)
    weights = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.where(row[:, None] >= row[None, :], weights, 0.0)
    denominator = tl.sum(weights, 1) + tl.sum(q.to(tl.float32) * total[None, :], 1)
    acc = tl.dot(q, mean, input_precision="ieee") * (seen / denominator)[:, None]
    return tl.dot((weights / denominator[:, None]).to(v.dtype), v, acc, input_precision="ieee"), denominator
