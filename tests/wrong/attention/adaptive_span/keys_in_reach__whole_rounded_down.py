"""kernels.attention.adaptive_span.keys_in_reach: a tile of which some keys lie on the ramp is taken for a full one."""


@triton.jit
def keys_in_reach(start, span, ramp, max_span, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    newest = start + S - T
    reach = tl.maximum(tl.minimum(tl.ceil(span + ramp).to(tl.int32), max_span), 1)
    full = tl.minimum(tl.floor(span).to(tl.int32) + 1, max_span)
    first = tl.maximum(newest - reach + 1, 0) // BLOCK_K * BLOCK_K
    last = tl.minimum(newest + BLOCK_Q, S)
    whole = tl.maximum(newest + BLOCK_Q - full, 0) // BLOCK_K * BLOCK_K
    diagonal = tl.maximum((newest + 1) // BLOCK_K * BLOCK_K, whole)
    return first, whole, diagonal, last
