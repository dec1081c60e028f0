"""kernels.attention.linear.chunk_key_gradients: weights overflow float16 before they are divided."""


@triton.jit
def chunk_key_gradients(rest, total, q, k, v, dout, denominator, delta, length, CHUNK: tl.constexpr):
    near = tl.arange(0, CHUNK)
    seen = near[:, None] <= near[None, :]  # [keys, queries]
    weights = tl.dot(k, tl.trans(q), input_precision="ieee").to(q.dtype) / denominator[None, :]
    dv = tl.dot(k, rest, input_precision="ieee")
    dv = tl.dot(tl.where(seen, weights, 0.0).to(dout.dtype), dout, dv, input_precision="ieee")
    dweights = tl.dot(v, tl.trans(dout), input_precision="ieee") - (delta * denominator)[None, :]
    dweights = tl.where(seen, dweights, 0.0).to(q.dtype)
    share = share_of_queries(q, denominator, length)
    dk = tl.dot(dweights, share, input_precision="ieee") * (1.0 / length)
    dk = tl.dot(v, tl.trans(rest), dk, input_precision="ieee")
    return dk - total[None, :], dv
