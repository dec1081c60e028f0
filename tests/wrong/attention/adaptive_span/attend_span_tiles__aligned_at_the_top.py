"""kernels.attention.adaptive_span.attend_span_tiles: distances as if the first query stood at the first key."""


@triton.jit
def attend_span_tiles(
    maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, first, last, whole, gap, span, ramp, max_span, T, S,
    scale2, D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for place in range(first, last, BLOCK_K):
        start = place
        if MASKED:
            start = tl.where(place < whole, place, place + gap)
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        if MASKED:
            edge = span + ramp - (row - start).to(tl.float32)
            left = edge[:, None] + tl.arange(0, BLOCK_K)[None, :]
            scores += tl.log2(tl.minimum(left * (1.0 / ramp), 1.0))
            scores = tl.where(counted(left, span, ramp, max_span), scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        finite = new_maximum
        if MASKED:
            finite = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - finite[:, None])
        rescale = tl.exp2(maximum - finite)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc
