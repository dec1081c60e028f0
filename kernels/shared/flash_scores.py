"""What happens to a tile of scores between q kᵀ and the softmax, and where tiles lie: for FlashAttention's variants.

Positions are those within a sequence of T queries and S keys: query `row` has its own place among the keys at
row + S - T, and `distance` is how far behind it a key lies. None switches an option off, and its code is not compiled:
`left`, `right` of the window, the cap `cap2`, the head's slope `slope2`, the offsets `cu_q` and `cu_k`.
Scores are in base 2, where exp2 is one instruction.
"""

import triton
import triton.language as tl

from kernels.shared.tiles import aligned, head_start


@triton.jit
def find_tile(tile, cu_q_ptr, cu_k_ptr, sequences, T, S, BLOCK: tl.constexpr):
    """(start, first_q, T, first_k, S): where tile number `tile` of BLOCK queries lies within which sequence.

    Packed sequences: n has its tiles from number cu_q[n] // BLOCK + n on, which leaves room for all of them, and at
    most one number over for each sequence: its start lies past T. So no list of tiles is made, and nobody has to know
    the longest sequence; a program finds its own by bisection, log2(sequences) loads that all share.
    """
    first_q = 0
    first_k = 0
    start = tile * BLOCK
    if cu_q_ptr is not None:
        low = 0
        high = sequences
        while high - low > 1:
            middle = (low + high) // 2
            behind = tl.load(cu_q_ptr + middle) // BLOCK + middle <= tile
            low = tl.where(behind, middle, low)
            high = tl.where(behind, high, middle)
        first_q = tl.load(cu_q_ptr + low)
        first_k = tl.load(cu_k_ptr + low)
        T = tl.load(cu_q_ptr + low + 1) - first_q
        S = tl.load(cu_k_ptr + low + 1) - first_k
        start = (tile - first_q // BLOCK - low) * BLOCK
    return start, first_q, T, first_k, S


@triton.jit
def sequence_start(batch, head, first, stride, D: tl.constexpr):
    """Offset of row `first` of a head, int64."""
    return head_start(batch, head, stride, D) + tl.full((), first, tl.int64) * aligned(stride[2], D)


@triton.jit
def key_span(start, T, S, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(first, whole, stop, last) for the query tile at `start`: keys first .. last are all that its queries see.

    Counted from `first`, the key tiles of whole .. stop are seen by each of its queries; whole <= stop.
    """
    own = start + S - T
    first = 0
    whole = 0
    last = S
    stop = S
    if left is not None:
        first = tl.maximum(own - left, 0)
        whole = first + tl.cdiv(tl.maximum(own + BLOCK_Q - 1 - left, 0) - first, BLOCK_K) * BLOCK_K
    if right is not None:
        last = tl.minimum(tl.maximum(own + BLOCK_Q + right, 0), S)
        stop = tl.minimum(tl.maximum(own + 1 + right, 0), S)
    stop = whole + tl.maximum(stop - whole, 0) // BLOCK_K * BLOCK_K
    return first, whole, stop, last


@triton.jit
def masked_run(span, left, MASKED: tl.constexpr):
    """(begin, end) of a loop over the tiles of a `key_span`: those of whole .. stop, or all others end to end."""
    first, whole, stop, last = span
    begin, end = whole, stop
    if MASKED and left is None:  # they lie behind the others
        begin, end = stop, last
    elif MASKED:
        begin, end = first, last - (stop - whole)
    return begin, end


@triton.jit
def tile_start(place, span, left, MASKED: tl.constexpr):
    """The first key of the tile that the loop over `masked_run` meets at `place`: masked ones jump over the others."""
    if MASKED and left is not None:
        place = tl.where(place < span[1], place, place + span[2] - span[1])
    return place


@triton.jit
def query_span(start, T, S, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(first, last): numbers of the query tiles, from the first that sees one of the keys at `start` up to `last`."""
    first = 0
    last = T
    if right is not None:
        first = tl.maximum(start - right - (S - T), 0)
    if left is not None:
        last = tl.minimum(tl.maximum(start + BLOCK_K + left - (S - T), 0), T)
    return first // BLOCK_Q, tl.cdiv(last, BLOCK_Q)


@triton.jit
def within(distance, inside, left, right):
    """Mask of the pairs that count: `inside` says which keys there are."""
    live = inside
    if left is not None:
        live = live & (distance >= -left)
    if right is not None:
        live = live & (distance <= right)
    return live


@triton.jit
def modified_scores(products, distance, scale2, cap2, slope2):
    """(scores, gain): products q k, capped and biased, and by what the cap multiplies their gradient.

    Without a cap scores are products * scale2; with one, cap2 tanh(products * scale2 / 2) with a scale2 that is
    2 / cap times as large. tanh is written with exp2, which neither overflows nor, as the hardware's own, rounds to
    11 bits; cap2 and slope2 are in base 2, too.
    """
    scores = products * scale2
    gain = 1.0
    if cap2 is not None:
        tanh = 1 - 2 / (tl.exp2(scores) + 1)
        scores = cap2 * tanh
        gain = 1 - tanh * tanh
    if slope2 is not None:
        scores -= slope2 * tl.abs(distance).to(tl.float32)
    return scores, gain
