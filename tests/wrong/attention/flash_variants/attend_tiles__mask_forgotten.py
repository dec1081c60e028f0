"""kernels.attention.flash_variants.attend_tiles: shows queries all keys of the tiles that they visit."""


@triton.jit
def attend_tiles(
    maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, row, span, T, S, left, right, scale2, cap2, slope2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):
    begin, end = masked_run(span, left, MASKED)
    for place in range(begin, end, BLOCK_K):
        start = tile_start(place, span, left, MASKED)
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        column = start + tl.arange(0, BLOCK_K)
        distance = column[None, :] - (row + S - T)[:, None]
        scores, _ = modified_scores(products, distance, scale2, cap2, slope2)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        finite = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - finite[:, None])
        rescale = tl.exp2(maximum - finite)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc
