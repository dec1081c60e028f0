"""kernels.attention.patterns.attend_blocks: exp instead of exp2."""


@triton.jit
def attend_blocks(
    maximum, total, acc, q, k_ptr, v_ptr, k_stride, v_stride, index_ptr, bits_ptr, first, last, S, scale2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = SIZE_K // BLOCK_K
    for step in range(first * parts, last * parts):
        block, part = step // parts, step % parts
        start = tl.load(index_ptr + block) * SIZE_K + part * BLOCK_K
        k = load_tile(k_ptr, start, k_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K], not yet scaled
        if MASKED:
            bits = bits_ptr + tl.full((), block, tl.int64) * (SIZE_Q * SIZE_K // 8)
            seen = load_seen(bits, part, SIZE_K, q.shape[0], BLOCK_K)
            scores = tl.where(seen, scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale2)
        finite = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)  # -inf - -inf would be NaN
        weights = tl.exp(scores * scale2 - finite[:, None])
        rescale = tl.exp2(maximum - finite)
        v = load_tile(v_ptr, start, v_stride, S, D, BLOCK_K, acc.shape[1], not MASKED)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc
