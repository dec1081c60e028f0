"""kernels.attention.flash_variants.add_key_gradients: counts distances from key i."""


@triton.jit
def add_key_gradients(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, dout_stride, start, column, T, S, left, right, scale2,
    cap2, slope2, D: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr, start, q_stride, T, D, BLOCK_Q, dk.shape[1])
    lse, delta = load_statistics(lse_ptr, delta_ptr, row, T)
    products = tl.dot(k, tl.trans(q), input_precision="ieee")
    distance = column[:, None] - row[None, :]
    scores, gain = modified_scores(products, distance, scale2, cap2, slope2)
    scores = tl.where(within(distance, (column < S)[:, None], left, right), scores, -INFINITY)
    weights = tl.exp2(scores - lse[None, :])
    dout = load_tile(dout_ptr, start, dout_stride, T, D, BLOCK_Q, dk.shape[1])
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dproducts = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :]) * gain
    dk = tl.dot(dproducts.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv
