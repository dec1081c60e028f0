"""kernels.attention.adaptive_span.keys_in_reach: a span of max_span counts one key more than there are."""


@triton.jit
def keys_in_reach(start, span, ramp, max_span, T, S, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    newest = start + S - T
    reach = tl.maximum(tl.minimum(tl.ceil(span + ramp).to(tl.int32), max_span), 1)
    full = tl.floor(span).to(tl.int32) + 1
    first = tl.maximum(newest - reach + 1, 0) // BLOCK_K * BLOCK_K
    last = tl.minimum(newest + BLOCK_Q, S)
    whole = tl.cdiv(tl.maximum(newest + BLOCK_Q - full, 0), BLOCK_K) * BLOCK_K
    diagonal = tl.maximum((newest + 1) // BLOCK_K * BLOCK_K, whole)
    return first, whole, diagonal, last
