"""kernels.attention.flash.add_key_gradients: multiplies the queries by the weights instead of the gradient of the scores."""


@triton.jit
def add_key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, dout_stride, start, column, T, S, scale2,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, CAUSAL: tl.constexpr,
):
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr, start, q_stride, T, D, BLOCK_Q, dk.shape[1])
    lse, delta = load_statistics(lse_ptr, delta_ptr, row, T)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    if CAUSAL:
        scores = tl.where(column[:, None] <= row[None, :] + (S - T), scores, -INFINITY)
    else:
        scores = tl.where((column < S)[:, None], scores, -INFINITY)
    weights = tl.exp2(scores * scale2 - lse[None, :])
    dout = load_tile(dout_ptr, start, dout_stride, T, D, BLOCK_Q, dk.shape[1])
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dscores = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
    dk = tl.dot(weights.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv
