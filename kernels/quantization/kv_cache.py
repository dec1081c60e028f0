"""Decode attention over a cache of codes, in Triton: each code is read once, and becomes a number only on chip.

Fused: unpacking, step * code + min, Q Kᵀ, softmax, the product with V. One new token attends to all positions before
it; it does two operations with each number of the cache, so that reading the cache is all the time it takes, and codes
of 4 or 2 bits take 5/16 or 3/16 of that of 16-bit numbers.

    bytes        2 B Hkv S D (bits + 32 / g) / 8  +  2 · 2 B H D      codes, 16-bit step and min of groups of g; q, out
    operations   4 B H S D                                         floor: bytes / bandwidth
Replaces attention over expanded keys and values, which moves 2 B Hkv S D (bits + 32 / g) / 8 + 8 B Hkv S D bytes if
they are expanded for the call (written once and read once in 16 bits), 4 B Hkv S D if they are kept expanded.

One program       a key/value head and a share of its positions, for all H / Hkv query heads that read it: they are
                  the rows of one tensor-core product, padded to 16, so no code is read or unpacked twice. Running
                  maximum and sums as in FlashAttention.
Shares            a batch of few heads would leave most of the GPU idle, so positions are cut into 1 to 64 shares until
                  there are two programs per multiprocessor or so. Each writes its normalised output and the log of
                  its sum in float32, `combine_kernel` weighs them: 8 (D + 1) bytes per share and query head.
Two parts         old positions are codes, the newest numbers (`window`); where one ends and the other begins may
                  differ between keys and values, so each tile of either takes its rows from where they are. Only
                  tiles at the seam and after it touch the window.
Not fast yet      where memory is: at most 18 machine instructions per number of a tile (4 bits, triton 3.7.1, sm_90;
                  counted with the code for the seam, not timed), of which an H200 can do about 4 while it reads one.

Layout: codes [B, Hkv, capacity, D * bits / 8] uint8, the first of a byte's channels in its highest bits, bits 2, 4 or
8; grid [B, Hkv, rows, columns, 2], step and min side by side: per token rows = capacity and columns = ceil(D / g), per
channel rows = ceil(capacity / g) and columns = D. All positions from `packed` on are skipped: capacity may exceed what
is filled. window [B, Hkv, W, D]. q, out [B, H, 1, D]; query head h reads head h // (H / Hkv).
Method: Sheng et al. 2023, arXiv:2303.06865; Liu et al. 2024, arXiv:2402.02750; shares of Flash-Decoding (Dao et al.
2023), pytorch.org/blog/flash-decoding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.shared.shares import combine_kernel

LOG2E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Held(NamedTuple):
    """The keys, or the values, of one layer as the wrapper takes them; anything with these attributes will do."""

    codes: Tensor
    grid: Tensor
    window: Tensor
    packed: int
    group_size: int
    per: str


@triton.jit
def unpack_tile(packed, BITS: tl.constexpr):
    """packed [BLOCK, BYTES] uint8 -> codes [BLOCK, BYTES * 8 / BITS], the highest bits of a byte first.

    `tl.join` makes a new last axis: neighbours come from one thread's byte, and no thread needs another's.
    """
    if BITS == 8:
        codes = packed
    elif BITS == 4:
        codes = tl.join(packed >> 4, packed & 15).reshape(packed.shape[0], packed.shape[1] * 2)
    else:
        even, odd = tl.join(packed >> 6, packed >> 2 & 3), tl.join(packed >> 4 & 3, packed & 3)
        codes = tl.join(even, odd).reshape(packed.shape[0], packed.shape[1] * 4)
    return codes


@triton.jit
def spread(x, TALL: tl.constexpr, BROAD: tl.constexpr):
    """x [M, N] -> [M * TALL, N * BROAD]: each number for its whole group."""
    groups = x[:, None, :, None].broadcast_to(x.shape[0], TALL, x.shape[1], BROAD)
    return groups.reshape(x.shape[0] * TALL, x.shape[1] * BROAD)


@triton.jit
def load_grid(
    grid_ptr, start, packed, D: tl.constexpr, GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(step, min) of the positions start .. start + BLOCK of one head, float32 [BLOCK, BLOCK_D].

    Each pair is loaded once and spread over its group on chip. Per channel, tiles hold whole groups, or groups whole
    tiles; groups that are not full, at the end of `packed` or of D, have a pair all the same.
    """
    LONG: tl.constexpr = GROUP if PER_CHANNEL else tl.constexpr(1)  # a group is LONG positions of WIDE channels
    WIDE: tl.constexpr = tl.constexpr(1) if PER_CHANNEL else GROUP
    TALL: tl.constexpr = LONG if LONG < BLOCK else BLOCK  # of which the tile holds
    BROAD: tl.constexpr = WIDE if WIDE < BLOCK_D else BLOCK_D
    row = start // LONG + tl.arange(0, BLOCK // TALL)[:, None]
    column = tl.arange(0, BLOCK_D // BROAD)[None, :]
    address = (row * ((D + WIDE - 1) // WIDE) + column)[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    live = (row * LONG < packed) & (column * WIDE < D)
    step, low = tl.split(tl.load(grid_ptr + address, mask=live[:, :, None], other=0.0).to(tl.float32))
    return spread(step, TALL, BROAD), spread(low, TALL, BROAD)


@triton.jit
def load_positions(
    codes_ptr, grid_ptr, window_ptr, start, packed, length, dtype: tl.constexpr,
    D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Positions start .. start + BLOCK of one head in `dtype`, [BLOCK, BLOCK_D], those from `length` on as zeros.

    Below `packed` they are codes, from there on rows of the window, of which the first is position `packed`. Channels
    from D on are finite. Nothing past either part is loaded.
    """
    BYTES: tl.constexpr = D * BITS // 8
    row, byte = start + tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D * BITS // 8)[None, :]
    codes = tl.load(codes_ptr + row * BYTES + byte, mask=(row < packed) & (byte < BYTES), other=0)
    step, low = load_grid(grid_ptr, start, packed, D, GROUP, PER_CHANNEL, BLOCK, BLOCK_D)
    x = (unpack_tile(codes, BITS).to(tl.float32) * step + low).to(dtype)
    if start + BLOCK > packed:
        column = tl.arange(0, BLOCK_D)[None, :]
        is_new = (row >= packed) & (row < length) & (column < D)
        new = tl.load(window_ptr + (row - packed) * D + column, mask=is_new, other=0.0)
        x = tl.where(row < packed, x, new.to(dtype))  # a group that is not full has steps past `packed`, too
    return x


@triton.jit
def grid_numbers(capacity, D: tl.constexpr, GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """How many steps and mins a head has."""
    groups = tl.cdiv(capacity, GROUP) * D if PER_CHANNEL else capacity * ((D + GROUP - 1) // GROUP)
    return 2 * groups


@triton.jit
def decode_kernel(
    q_ptr, k_codes_ptr, k_grid_ptr, k_window_ptr, v_codes_ptr, v_grid_ptr, v_window_ptr, out_ptr, lse_ptr,
    group, capacity, k_packed, v_packed, length, scale2,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr,
    K_PER_CHANNEL: tl.constexpr, V_PER_CHANNEL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the `group` query heads that read key/value head program_id(0), over share program_id(1) of keys.

    q is [heads, group, D]. out [heads, group, shares, D] is each share's softmax-weighted mean of values, and lse
    [heads, group, shares] the base-2 log of the sum of its exp2(score), with scores q kᵀ scale2. A share is a run of
    whole tiles of BLOCK positions, never none. Sums are float32; keys, values and weights meet in the dtype of q.
    """
    head, share, shares = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    k_codes_ptr += head * capacity * (D * K_BITS // 8)
    v_codes_ptr += head * capacity * (D * V_BITS // 8)
    k_grid_ptr += head * grid_numbers(capacity, D, K_GROUP, K_PER_CHANNEL)
    v_grid_ptr += head * grid_numbers(capacity, D, V_GROUP, V_PER_CHANNEL)
    k_window_ptr += head * (length - k_packed) * D
    v_window_ptr += head * (length - v_packed) * D
    member, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    query, live = head * group + member, (member < group)[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + query[:, None] * D + column[None, :], mask=live, other=0.0)
    maximum = tl.full((BLOCK_H,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    tiles = tl.cdiv(length, BLOCK)
    for start in range(share * tiles // shares * BLOCK, (share + 1) * tiles // shares * BLOCK, BLOCK):
        k = load_positions(
            k_codes_ptr, k_grid_ptr, k_window_ptr, start, k_packed, length, q.dtype, D, K_BITS, K_GROUP, K_PER_CHANNEL,
            BLOCK, BLOCK_D,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        scores = tl.where((start + tl.arange(0, BLOCK) < length)[None, :], scores, -INFINITY)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # each tile has a position: finite
        weights, rescale = tl.exp2(scores - new_maximum[:, None]), tl.exp2(maximum - new_maximum)
        v = load_positions(
            v_codes_ptr, v_grid_ptr, v_window_ptr, start, v_packed, length, q.dtype, D, V_BITS, V_GROUP, V_PER_CHANNEL,
            BLOCK, BLOCK_D,
        )  # fmt: skip
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        maximum = new_maximum
    row = query * shares + share
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + column[None, :], out, mask=live)
    tl.store(lse_ptr + row, maximum + tl.log2(total), mask=member < group)


def configuration(heads: int, length: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Positions of a tile, and shares: 1 to 64, until two programs run on each of 132 multiprocessors.

    More than one share only where each has at least two tiles.
    """
    block, shares = 32 if dtype is torch.float32 else 128, 1
    tiles = triton.cdiv(length, block)
    while heads * shares < 264 and shares < 64 and tiles >= 4 * shares:
        shares *= 2
    return {"block": block, "shares": shares}


def decode_attention(q: Tensor, keys: Held, values: Held, scale: float | None = None, **blocks: int) -> Tensor:
    """softmax(q k̂ᵀ scale) v̂ for one new token, which sees all positions of the cache: `[B, H, 1, D]` in q's dtype.

    q       float16, bfloat16 or float32 (IEEE products, slow: for tests), contiguous
    keys    as `Held`: codes uint8, of 2, 4 or 8 bits; grid and window float16, bfloat16 or float32; all contiguous; of
            heads and room as many as values; group_size a power of two; per "token" or "channel"
    values  the same: bits, groups, per and packed of their own, but as many positions (packed + W)
    scale   of the scores; None: 1 / √D
    blocks  parts of `configuration` to replace: block, a power of two of at least 16, and shares

    Raises ValueError or TypeError for anything else.
    """
    length = _checked(q, keys, values)
    (B, H, _, D), (_, Hkv, capacity, _) = q.shape, keys.codes.shape
    chosen = configuration(B * Hkv, length, q.dtype) | blocks
    shares = min(chosen["shares"], triton.cdiv(length, chosen["block"]))
    out = torch.empty_like(q)
    partial = out if shares == 1 else torch.empty((B * H, shares, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((B * H, shares), dtype=torch.float32, device=q.device)
    meta = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D))}
    decode_kernel[(B * Hkv, shares)](
        q, *keys[:3], *values[:3], partial, lse, H // Hkv, capacity, keys.packed, values.packed, length,
        (D**-0.5 if scale is None else scale) * LOG2E.value,
        K_BITS=8 * keys.codes.shape[3] // D, V_BITS=8 * values.codes.shape[3] // D,
        K_GROUP=keys.group_size, V_GROUP=values.group_size,
        K_PER_CHANNEL=keys.per == "channel", V_PER_CHANNEL=values.per == "channel",
        BLOCK_H=max(16, triton.next_power_of_2(H // Hkv)), BLOCK=chosen["block"], num_warps=8, num_stages=2, **meta,
    )  # fmt: skip
    if shares > 1:
        combine_kernel[(B * H,)](partial, lse, out, shares, SHARES=triton.next_power_of_2(shares), **meta)
    return out


def _checked(q: Tensor, keys: Held, values: Held) -> int:
    """How many positions there are, or the error that `decode_attention` promises."""
    require(q.dim() == 4 and q.shape[2] == 1 and q.numel() > 0, f"q must be [B, H, 1, D], got {tuple(q.shape)}")
    B, H, _, D = q.shape
    for name, held in {"keys": keys, "values": values}.items():
        _check_half(name, held, B, D)
    k, v = keys.codes.shape, values.codes.shape
    require(k[1:3] == v[1:3], f"keys and values must have as many heads and one capacity, got {tuple(k)}, {tuple(v)}")
    require(H % k[1] == 0, f"q's heads must be a multiple of the cache's, got {H} and {k[1]}")
    lengths = [held.packed + held.window.shape[2] for held in (keys, values)]
    require(lengths[0] == lengths[1] > 0, f"keys and values must be as many positions, and some, got {lengths}")
    require_dtype(FLOATS, q=q)
    tensors = {f"{name}.{part}": getattr(held, part) for name, held in (("keys", keys), ("values", values))
               for part in ("codes", "grid", "window")}  # fmt: skip
    require_contiguous(q=q, **tensors)
    require_launchable(q=q, **tensors)
    return lengths[0]


def _check_half(name: str, held: Held, B: int, D: int) -> None:
    """Raise unless the parts of `held` fit together, a batch of B and heads of D."""
    codes, grid, window, packed, group, per = (getattr(held, field) for field in Held._fields)
    require(per in ("token", "channel"), f"{name}.per must be 'token' or 'channel', got {per!r}")
    require(group > 0 and group & (group - 1) == 0, f"{name}.group_size must be a power of two, got {group}")
    shape = tuple(codes.shape)
    fits = len(shape) == 4 and shape[0] == B and 8 * shape[3] in (2 * D, 4 * D, 8 * D)
    require(fits, f"{name}.codes must be [{B}, Hkv, capacity, D * bits / 8] with D={D}, bits 2, 4 or 8, got {shape}")
    groups = (shape[2], -(-D // group)) if per == "token" else (-(-shape[2] // group), D)
    expected = (*shape[:2], *groups, 2)
    require(tuple(grid.shape) == expected, f"{name}.grid must be {expected} per {per}, got {tuple(grid.shape)}")
    expected = (*shape[:2], window.shape[-2] if window.dim() > 1 else "W", D)
    require(tuple(window.shape) == expected, f"{name}.window must be {expected}, got {tuple(window.shape)}")
    require(0 <= packed <= shape[2], f"{name}.packed must be from 0 to capacity={shape[2]}, got {packed}")
    require_dtype((torch.uint8,), **{f"{name}.codes": codes})
    require_dtype(FLOATS, **{f"{name}.grid": grid, f"{name}.window": window})


def expand(held: Held, dtype: torch.dtype) -> Tensor:
    """The positions of `held` in dtype, `[B, Hkv, S, D]`, by plain torch operators."""
    D = held.window.shape[-1]
    bits = 8 * held.codes.shape[-1] // D
    places = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=held.codes.device)
    codes = (held.codes[:, :, : held.packed, :, None] >> places & (2**bits - 1)).flatten(-2)
    grid = held.grid.float().repeat_interleave(held.group_size, 3 if held.per == "token" else 2)
    step, low = grid[:, :, : held.packed, :D].unbind(-1)
    return torch.cat([(codes * step + low).to(dtype), held.window.to(dtype)], dim=2)


def sdpa(q: Tensor, k: Tensor | Held, v: Tensor | Held) -> Tensor:
    """Attention of one token by torch's own operator, over numbers; what is held as codes is expanded first."""
    k, v = (expand(x, q.dtype) if isinstance(x, Held) else x for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def expanded(q: Tensor, keys: Held, values: Held) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of `sdpa`."""
    return q, expand(keys, q.dtype), expand(values, q.dtype)


def half(B: int, Hkv: int, length: int, D: int, bits: int, group: int, per: str, window: int, device) -> Held:
    """`length` positions, the last `window` of which are numbers; contents on a GPU only."""
    old = length - window
    rows, columns = (old, D // group) if per == "token" else (-(-old // group), D)
    codes = torch.empty((B, Hkv, old, D * bits // 8), dtype=torch.uint8, device=device)
    grid = torch.empty((B, Hkv, rows, columns, 2), dtype=torch.bfloat16, device=device)
    newest = torch.empty((B, Hkv, window, D), dtype=torch.bfloat16, device=device)
    if torch.device(device).type == "cuda":
        codes.random_(0, 256)
        grid[..., 0].uniform_(0.5 / 2**bits, 2 / 2**bits)
        grid[..., 1].uniform_(-1, 0)
        newest.normal_()
    return Held(codes, grid, newest, old, group, per)


def decode_case(name: str, B: int, heads: int, kv_heads: int, length: int, bits: int, per: str, window: int) -> Case:
    """One token in a layer of Llama, D = 128; keys in groups of 32 along `per`, values per token."""

    def inputs(device: torch.device) -> tuple:
        q = torch.empty((B, heads, 1, 128), dtype=torch.bfloat16, device=device)
        shape = (B, kv_heads, length, 128, bits, 32)
        return q.normal_() if q.is_cuda else q, *(half(*shape, p, window, device) for p in (per, "token"))

    numbers = B * kv_heads * 128
    old = 2 * numbers * (length - window) * (bits + 32 // 32) // 8
    return Case(
        name,
        inputs=inputs,
        run=decode_attention,
        expected=sdpa,
        bytes=old + 4 * numbers * window + 4 * B * heads * 128,
        operations=4 * B * heads * length * 128,
        kind="stream",
        peers={"SDPA, 16-bit cache": sdpa, "expand, then SDPA": sdpa},
        prepare={"SDPA, 16-bit cache": expanded},
    )


CASES = [
    decode_case("8B, batch 1 x 8192, 4 bits per token", 1, 32, 8, 8192, 4, "token", 1),
    decode_case("8B, batch 16 x 8192, 4 bits per token", 16, 32, 8, 8192, 4, "token", 1),
    decode_case("8B, batch 16 x 8192, 2 bits per channel", 16, 32, 8, 8192, 2, "channel", 128),
    decode_case("7B, batch 16 x 4096, 4 bits per channel", 16, 32, 32, 4096, 4, "channel", 128),
]
