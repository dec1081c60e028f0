"""kernels.attention.linear.attend_chunk: what comes from the state is not divided."""


@triton.jit
def attend_chunk(mean, total, q, k, v, seen, eps, CHUNK: tl.constexpr):
    row = tl.arange(0, CHUNK)
    weights = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.where(row[:, None] >= row[None, :], weights, 0.0)
    denominator = tl.sum(weights, 1) + tl.sum(q.to(tl.float32) * total[None, :], 1) + eps
    acc = tl.dot(q, mean, input_precision="ieee") * seen
    return tl.dot((weights / denominator[:, None]).to(v.dtype), v, acc, input_precision="ieee"), denominator
