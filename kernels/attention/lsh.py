"""LSH attention in Triton: each chunk of the sorted tokens attends to itself and the one before it, in every round.

Fused: the gather of queries, keys and values through the order that torch's stable sort gives, the division by |k|, all
masks, the softmax, and the scatter of the result to where its token stood. No sorted copy of qk or v is ever made.
A second kernel merges the rounds by their log-sum-exps.

With e bytes a number, R rounds, C tokens in a chunk and rows = B H T:
    floor       e rows 3 D + 4 R rows + 4 rows bytes: qk, v and int32 buckets in, out and float32 lse out, each once
    moved       2 e D + 8 a row and round for qk, v and the order (again as queries and as the chunk before, but then
                from L2), e D + 4 for its out and lse, and as much to read them again and merge; one round needs no
                merging. The sort moves at least 4 + 4 + 8 bytes a row and round besides
    operations  8 D C a row and round, about half of them masked if causal
Replaces sorted copies of queries, keys and values, the last two with the chunk before beside each, scores and weights:
written and read, e (10 D + 8 C) bytes a row and round more. Rounds cannot be merged on chip, because a token has other
neighbours in each; adding them to one float32 out as they end would move 8 D bytes a row and round instead of 2 e D,
and every round would wait for the one before.

`dedup` counts how often a pair meets from the chunks in which both lie, 4 bytes a row and round, compared on chip: what
a T x T matrix of counts would say, without it.

Layout: qk, v [B, H, T, D], float16, bfloat16 or float32, D up to 128; any strides with a contiguous last axis
(multiples of 8 if D is one). buckets [B, H, R, T], integers; T and C are free, tiles are padded to powers of two, and a
chunk may be several of them. Scores are in base 2: `scale2` = scale log2(e).
Method: Kitaev et al. 2020, arXiv:2001.04451, sections 2 and A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_dtype, require_launchable
from kernels.shared.tiles import aligned, has_warpgroup_products, head_start, loadable

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
INFINITY = tl.constexpr(math.inf)
SELF = -5e4  # a token's score with itself
SELF2 = tl.constexpr(SELF * math.log2(math.e))
SHORTEST = tl.constexpr(1e-12)  # what a shorter key is divided by
FLOATS, INTEGERS = (torch.float16, torch.bfloat16, torch.float32), (torch.int32, torch.int64)


@triton.jit
def chunk_tokens(order_ptr, part, parts, start, T, chunk, BLOCK: tl.constexpr):
    """(position int32, live) [BLOCK] of the tokens from `start` on in chunk `part`, counted through all rounds."""
    near = start + tl.arange(0, BLOCK)
    place = part % parts * chunk + near
    live = (near < chunk) & (place < T)
    position = tl.load(order_ptr + (part // parts).to(tl.int64) * T + place, mask=live, other=0)
    return position.to(tl.int32), live


@triton.jit
def load_tokens(ptr, position, live, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The vectors [BLOCK, BLOCK_D] of a head's tokens, from wherever they are; zero where not live."""
    column = tl.arange(0, BLOCK_D)
    mask = live[:, None]
    if D != BLOCK_D:
        mask = mask & (column < D)[None, :]
    return tl.load(ptr + position[:, None].to(tl.int64) * aligned(stride[2], D) + column[None, :], mask=mask, other=0.0)


@triton.jit
def attend_chunk(maximum, total, acc, q, k, v, row, column, live, lower, scale2, CAUSAL: tl.constexpr):
    """The running softmax of queries at positions `row` [BLOCK] over one more chunk, at `column` [BLOCK].

    maximum and total [BLOCK], acc [BLOCK, BLOCK_D], float32, as FlashAttention keeps them, in base 2: the largest score
    so far (-inf before any), the sum of exp2(score - maximum), and of v with these weights; the new three are returned.
    q, k, v [BLOCK, BLOCK_D], zero past D. The score of i with j is q_i·k_j / |k_j| scale2, |k_j| taken as SHORTEST
    where it is less, or SELF2 if both have one position; less `lower` [BLOCK, BLOCK]. Only `live` [BLOCK, BLOCK] pairs
    count, and if CAUSAL no later position; a row may see nothing. Weights meet v in its dtype.
    """
    length = tl.sqrt(tl.sum(k.to(tl.float32) * k.to(tl.float32), 1))
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale2 / tl.maximum(length, SHORTEST))[None, :]
    scores = tl.where(row[:, None] == column[None, :], SELF2, scores) - lower
    if CAUSAL:
        live = live & (column[None, :] <= row[:, None])
    scores = tl.where(live, scores, -INFINITY)
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    finite = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)
    weights = tl.exp2(scores - finite[:, None])
    rescale = tl.exp2(maximum - finite)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return new_maximum, total * rescale + tl.sum(weights, 1), acc


@triton.jit
def repeats(place_ptr, bucket_ptr, row, column, T, parts, rounds, ACROSS: tl.constexpr):
    """log2 [BLOCK, BLOCK] of how often a query at `row` meets the key at `column` in all rounds; 0 where never.

    place and bucket [rounds, T] of this head: each token's chunk, counted through all rounds, and its bucket. A key in
    chunk p is met by the queries of chunk p, and by those of p + 1, which may be the next round's first.
    """
    count = tl.zeros((row.shape[0], column.shape[0]), tl.int32)
    for r in range(0, rounds):
        following = (r + 1) % rounds
        mine = tl.load(place_ptr + r * T + row)[:, None]
        theirs = tl.load(place_ptr + r * T + column)[None, :]
        after = (theirs + 1) % (rounds * parts)
        here, next_chunk = mine == theirs, mine == after
        if ACROSS:
            next_chunk = next_chunk | (tl.load(place_ptr + following * T + row)[:, None] == after)
        else:
            bucket = tl.load(bucket_ptr + r * T + row)[:, None]
            same = bucket == tl.load(bucket_ptr + r * T + column)[None, :]
            here, next_chunk = here & same, next_chunk & same
        count += here.to(tl.int32) + (next_chunk & (rounds * parts > 1)).to(tl.int32)
    return tl.log2(tl.maximum(count, 1).to(tl.float32))


@triton.jit
def attend_kernel(
    qk_ptr, v_ptr, order_ptr, bucket_ptr, place_ptr, out_ptr, lse_ptr, qk_stride, v_stride, heads, rounds, T, chunk,
    scale2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, ACROSS: tl.constexpr, DEDUP: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the queries of one chunk of one round, of head program_id(1)."""
    tiles, head, parts = tl.cdiv(chunk, BLOCK), tl.program_id(1), tl.cdiv(T, chunk)
    part = tl.program_id(0) // tiles
    first = head.to(tl.int64) * rounds * T
    qk_ptr += head_start(head // heads, head % heads, qk_stride, D)
    v_ptr += head_start(head // heads, head % heads, v_stride, D)
    row, live = chunk_tokens(order_ptr + first, part, parts, tl.program_id(0) % tiles * BLOCK, T, chunk, BLOCK)
    q = load_tokens(qk_ptr, row, live, qk_stride, D, BLOCK_D)
    maximum = tl.full((BLOCK,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    before = tl.where(part == 0, rounds * parts, part) - 1
    tiles = tl.cdiv(chunk, BLOCK_K)
    for tile in range(0, tl.where(before == part, tiles, 2 * tiles)):  # of the chunk, then of the one before, if any
        other = tl.where(tile < tiles, part, before)
        column, seen = chunk_tokens(order_ptr + first, other, parts, tile % tiles * BLOCK_K, T, chunk, BLOCK_K)
        lower = tl.zeros((1, 1), tl.float32)
        if DEDUP:
            lower = repeats(place_ptr + first, bucket_ptr + first, row, column, T, parts, rounds, ACROSS)
        k = load_tokens(qk_ptr, column, seen, qk_stride, D, BLOCK_D)
        pairs = live[:, None] & seen[None, :]
        if not ACROSS:
            labels = bucket_ptr + first + (part // parts).to(tl.int64) * T
            pairs = pairs & (tl.load(labels + row)[:, None] == tl.load(labels + column)[None, :])
            pairs = pairs & (other // parts == part // parts)
        v = load_tokens(v_ptr, column, seen, v_stride, D, BLOCK_D)
        maximum, total, acc = attend_chunk(maximum, total, acc, q, k, v, row, column, pairs, lower, scale2, CAUSAL)
    place = ((part // parts).to(tl.int64) * tl.num_programs(1) + head) * T + row
    wide = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (wide < D)[None, :]
    total = tl.where(live, total, 1.0)
    tl.store(out_ptr + place[:, None] * D + wide[None, :], (acc / total[:, None]).to(q.dtype), mask=inside)
    tl.store(lse_ptr + place, (maximum + tl.log2(total)) * LN2, mask=live)


@triton.jit
def merge_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows of out [rows, D] and lse [rows], from outs [ROUNDS, rows, D] and lses [ROUNDS, rows].

    lse = log of the sum of exp(lse_r) over the rounds, all finite, of any size; out is that of the rounds, weighted by
    exp(lse_r - lse). All in float32, out rounded to its dtype at the end.
    """
    row, column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    live = row < rows
    inside = live[:, None] & (column < D)[None, :]
    maximum = tl.full((BLOCK,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    place = row
    for _ in range(0, ROUNDS):
        lse = tl.load(lses_ptr + place, mask=live, other=0.0) * LOG2E
        outs = tl.load(outs_ptr + place[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
        new_maximum = tl.maximum(maximum, lse)
        weight, rescale = tl.exp2(lse - new_maximum), tl.exp2(maximum - new_maximum)
        total = total * rescale + weight
        acc = acc * rescale[:, None] + outs * weight[:, None]
        maximum = new_maximum
        place += rows
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + column[None, :], out, mask=inside)
    tl.store(lse_ptr + row, (maximum + tl.log2(total)) * LN2, mask=live)


def checked_scale(qk: Tensor, v: Tensor, buckets: Tensor, chunk: int, scale: float | None) -> float:
    """The scale, 1/√D for None. Raises ValueError or TypeError for input that the kernels cannot serve."""
    require_dtype(FLOATS, qk=qk)
    require_dtype((qk.dtype,), v=v)
    require_dtype(INTEGERS, buckets=buckets)
    for name, x in {"qk": qk, "v": v}.items():
        require(
            x.dim() == 4 and x.numel() > 0 and x.shape == qk.shape and x.shape[3] <= 128,
            f"{name} must be [B, H, T, D], not empty, D at most 128, and fit qk; got {tuple(x.shape)}",
        )
        require(
            loadable(x),
            f"{name} must have a contiguous last axis, and strides that are multiples of 8 if its head size is; "
            f"got shape {tuple(x.shape)}, strides {x.stride()}",
        )
    shape = tuple(buckets.shape)
    fits = len(shape) == 4 and (*shape[:2], shape[3]) == tuple(qk.shape[:3]) and shape[2] > 0
    require(fits, f"buckets must be [B, H, R, T] to fit qk {tuple(qk.shape)}, got {shape}")
    require(chunk >= 1, f"chunk must be at least 1, got {chunk}")
    scale = 1 / math.sqrt(qk.shape[3]) if scale is None else scale
    require(math.isfinite(scale) and scale > 0, f"scale must be positive and finite, got {scale}")
    require_launchable(qk=qk, v=v, buckets=buckets)
    return scale


def launch_options(qk: Tensor, chunk: int, dedup: bool) -> dict:
    """Tiles of queries and of keys, warps and stages; chosen by machine code that spills nothing at the sizes of CASES.

    Counting repeats takes the registers of half a tile, and of half the queries where operands of products lie in
    registers, too; at D up to 64 four warps hold all, unless loads run ahead.
    """
    few = qk.dtype == torch.float32 or (dedup and not has_warpgroup_products())
    block = min(max(16, triton.next_power_of_2(chunk)), 32 if few else 64)
    small = qk.shape[3] <= 64
    keys = min(block, 32 if small or dedup else 64)
    return {"BLOCK": block, "BLOCK_K": keys, "num_warps": 4 if small or few else 8, "num_stages": 1 if small else 2}


def chunk_places(order: Tensor, chunk: int) -> Tensor:
    """int32 `[B, H, R, T]`: the chunk, counted through all rounds, in which each token lies in each round."""
    (R, T), device = order.shape[2:], order.device
    chunks = torch.arange(T, dtype=torch.int32, device=device) // chunk
    chunks = chunks + -(-T // chunk) * torch.arange(R, dtype=torch.int32, device=device)[:, None]
    return torch.empty(order.shape, dtype=torch.int32, device=device).scatter_(-1, order, chunks.expand_as(order))


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    buckets: Tensor,
    chunk: int = 64,
    causal: bool = True,
    across: bool = True,
    dedup: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in chunks of the tokens sorted by bucket, rounds merged: out like qk, contiguous, and float32 lse.

    qk, v `[B, H, T, D]`; buckets `[B, H, R, T]`, int32 or int64; lse `[B, H, T]`. Options as in the chapter; scale 1/√D
    if None. Not differentiable. Raises ValueError for shapes, strides, devices or options that do not fit, TypeError
    for dtypes.
    """
    scale = checked_scale(qk, v, buckets, chunk, scale)
    (B, H, T, D), R = qk.shape, buckets.shape[2]
    buckets = buckets.contiguous()
    order = buckets.sort(dim=-1, stable=True).indices
    places = chunk_places(order, chunk) if dedup else order
    outs = torch.empty((R, B, H, T, D), dtype=qk.dtype, device=qk.device)
    lses = torch.empty((R, B, H, T), dtype=torch.float32, device=qk.device)
    sizes = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D))}
    options = launch_options(qk, chunk, dedup)
    tiles = R * triton.cdiv(T, chunk) * triton.cdiv(chunk, options["BLOCK"])
    attend_kernel[(tiles, B * H)](
        qk, v, order, buckets, places, outs, lses, qk.stride(), v.stride(), H, R, T, chunk,
        scale * LOG2E.value, **sizes, CAUSAL=causal, ACROSS=across, DEDUP=dedup, **options,
    )  # fmt: skip
    if R == 1:
        return outs[0], lses[0]
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    merge_kernel[(triton.cdiv(B * H * T, 16),)](
        outs, lses, out, lse, B * H * T, **sizes, BLOCK=16, ROUNDS=R, num_warps=4
    )
    return out, lse


def attend(qk: Tensor, v: Tensor, buckets: Tensor, chunk: int, dedup: bool) -> Tensor:
    """Causal attention across buckets without its lse, as the cases call it."""
    return lsh_attention(qk, v, buckets, chunk, dedup=dedup)[0]


def in_torch(qk: Tensor, v: Tensor, buckets: Tensor, chunk: int, dedup: bool, precise: bool) -> Tensor:
    """The same by torch's operators, all chunks side by side, for T a multiple of chunk. `precise`: in float32."""
    (D, dtype), R = (qk.shape[3], qk.dtype), buckets.shape[2]
    if precise:
        qk, v = qk.float(), v.float()
    order = buckets.sort(dim=-1, stable=True).indices
    rows = order.flatten(2).unflatten(2, (-1, chunk))
    columns = torch.cat((rows, rows.roll(1, 2)), dim=-1)
    queries, keys, values = (
        x.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, D)).unflatten(2, at.shape[2:])
        for x, at in ((qk, rows), (F.normalize(qk, dim=-1), columns), (v, columns))
    )
    i, j = rows[..., None], columns[..., None, :]
    scores = (D**-0.5 * queries @ keys.mT).float().masked_fill(i == j, SELF)
    if dedup:
        scores = scores - met(chunk_places(order, chunk), i, j, R * qk.shape[2] // chunk).log()
    scores = scores.masked_fill(j > i, -math.inf)
    outs = (scores.softmax(-1).to(v.dtype) @ values).flatten(2, 3).unflatten(2, (R, -1))
    lses, back = scores.logsumexp(-1).flatten(2).unflatten(2, (R, -1)), order.argsort(-1)
    outs, lses = outs.gather(3, back[..., None].expand(-1, -1, -1, -1, D)), lses.gather(3, back)
    return (lses.softmax(2)[..., None] * outs).sum(2).to(dtype)


def met(places: Tensor, i: Tensor, j: Tensor, chunks: int) -> Tensor:
    """How often queries i `[B, H, N, m, 1]` meet keys j `[B, H, N, 1, c]`, at least 1, float32."""
    R, count = places.shape[2], torch.zeros((), device=places.device)
    for r in range(R):
        mine, following = (places[:, :, s % R].gather(2, i.flatten(2)).view(i.shape) for s in (r, r + 1))
        theirs = places[:, :, r].gather(2, j.flatten(2)).view(j.shape)
        after = (theirs + 1) % chunks
        count = count + (mine == theirs).float() + ((mine == after) | (following == after)).float()
    return count.clamp(min=1.0)


def case(name: str, heads: int, T: int, D: int, rounds: int, chunk: int = 64, dedup: bool = False) -> Case:
    """A causal prefill of batch 1 in bfloat16, hashed into T / chunk buckets. Bytes: the floor of this file."""

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        make = torch.empty if device.type == "cpu" else torch.randn
        qk, v = (make((1, heads, T, D), dtype=torch.bfloat16, device=device) for _ in range(2))
        return qk, v, torch.randint(T // chunk, (1, heads, rounds, T), dtype=torch.int32, device=device)

    rows, run = heads * T, partial(attend, chunk=chunk, dedup=dedup)
    slow: Callable = partial(in_torch, chunk=chunk, dedup=dedup)
    return Case(
        name,
        inputs=inputs,
        run=run,
        expected=partial(slow, precise=True),
        bytes=rows * (2 * 3 * D + 4 * rounds + 4),
        operations=8 * D * chunk * rounds * rows,
        kind="matrix",
        tolerance=2e-2,
        peers={"chunked in torch": partial(slow, precise=False)},
    )


CASES = [
    case("4096 tokens, 32 heads of 128, 4 rounds", 32, 4096, 128, 4),
    case("16384 tokens, 32 heads of 128, 4 rounds", 32, 16384, 128, 4),
    case("4096 tokens, 32 heads of 128, 8 rounds, counted once", 32, 4096, 128, 8, dedup=True),
    case("4096 tokens, 32 heads of 64, 1 round", 32, 4096, 64, 1),
    case("4096 tokens, 32 heads of 80, 4 rounds of 128", 32, 4096, 80, 4, chunk=128),
]
