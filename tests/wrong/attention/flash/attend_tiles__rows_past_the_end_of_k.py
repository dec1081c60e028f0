"""kernels.attention.flash.attend_tiles: loads K unmasked in the last tile."""


@triton.jit
def attend_tiles(
    maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, first, last, T, S, scale2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):
    for start in range(first, last, BLOCK_K):
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, acc.shape[1], True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(visible(start, row, T, S, BLOCK_K, CAUSAL), scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale2)
        finite = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)
        weights = tl.exp2(scores * scale2 - finite[:, None])
        rescale = tl.exp2(maximum - finite)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc
