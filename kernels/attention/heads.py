"""QKV split, rotary positions and cache append in one launch: what stands between the projection and attention.

Fused: cutting the projection's rows into heads of q, k and v, turning q and k by their position's angles, laying q out
as attention reads it, and putting k and v where they stay, in the cache, each sequence at its own position.

With e bytes a number, N = B T new tokens:
    floor        2 e N (H + 2 Hkv) D           qkv read once; q, and k and v in the cache, written once
    and          4 N D + 8 B                   cos and sin of a token's position in float32; positions
    operations   3 N (H + Hkv) D               floor: bytes / bandwidth
Replaces one operator after the other, `x * cos + cat(-b, a) * sin` for q and k and two copies into the cache. It moves
each number of q and k ten times for the rotation (five results are written, one of half the size) and those of k and v
twice more: e N D (10 (H + Hkv) + 4 Hkv) bytes, 4.5 times the floor for H / Hkv = 4, and leaves q a transposed view.
A decode step has few tokens; there it is the number of launches that counts, one instead of a dozen.

One program       one token and `block` of its H + 2 Hkv heads, whichever they are: rows of q are stored to q, rows of k
                  and v to the caches, by three masked stores, of which masked rows move nothing. A token's programs
                  each load its cos and sin, D numbers; all but the first find them in the L2 cache.
Pairs             "half": channels i and i + D/2 are two tiles. "interleaved": 2i and 2i + 1 are loaded as one tile and
                  split in registers, so that loads stay 128 bits wide. Rotation is in float32 and rounded once.
Bad positions     cannot raise without waiting for the GPU. A token whose position lies outside the cache gets a q of
                  NaN, and nothing is stored in the caches for it.

Layout: qkv [B T, (H + 2 Hkv) D], row b T + t; caches [B, Hkv, capacity, D]; q [B, H, T, D]; cos, sin [P, D/2] float32,
P >= capacity; positions [B] int64. Offsets are int64: a cache of long sequences has more than 2^31 numbers.
Method: Su et al. 2021, arXiv:2104.09864; Ainslie et al. 2023, arXiv:2305.13245.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("half", "interleaved")


@triton.jit
def load_pairs(row_ptr, live, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(a, b), each [BLOCK, HALF]: the channels that are turned together, of the heads at row_ptr [BLOCK, 1].

    HALF is D / 2 padded to a power of two. Rows that are not live, and padding, read as zero.
    """
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(row_ptr + column, mask=live & (column < D), other=0.0)
        a, b = tl.split(x.reshape(x.shape[0], HALF, 2))
    else:
        column = tl.arange(0, HALF)[None, :]
        inside = live & (column < D // 2)
        a = tl.load(row_ptr + column, mask=inside, other=0.0)
        b = tl.load(row_ptr + D // 2 + column, mask=inside, other=0.0)
    return a, b


@triton.jit
def store_pairs(row_ptr, a, b, live, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Inverse of `load_pairs`, rounding to the dtype behind row_ptr."""
    HALF: tl.constexpr = a.shape[1]
    a, b = a.to(row_ptr.dtype.element_ty), b.to(row_ptr.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        x = tl.join(a, b).reshape(a.shape[0], 2 * HALF)
        tl.store(row_ptr + column, x, mask=live & (column < D))
    else:
        column = tl.arange(0, HALF)[None, :]
        inside = live & (column < D // 2)
        tl.store(row_ptr + column, a, mask=inside)
        tl.store(row_ptr + D // 2 + column, b, mask=inside)


@triton.jit
def rope_append_kernel(
    qkv_ptr, k_ptr, v_ptr, positions_ptr, cos_ptr, sin_ptr, q_ptr, T, heads, kv_heads, capacity,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program: token program_id(0) = sequence * T + step, and BLOCK of its heads + 2 kv_heads heads.

    The token's position is positions[sequence] + step. Where it is not in 0 .. capacity − 1, q is NaN and k and v are
    not stored. k_ptr and v_ptr are the caches; HALF is D / 2 padded to a power of two.
    """
    token = tl.program_id(0).to(tl.int64)
    sequence, step = token // T, token % T
    position = tl.load(positions_ptr + sequence) + step
    inside = (position >= 0) & (position < capacity)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    every = heads + 2 * kv_heads
    a, b = load_pairs(qkv_ptr + (token * every + head) * D, head < every, D, HALF, INTERLEAVED)
    pair = tl.arange(0, HALF)[None, :]
    known = inside & (pair < D // 2)
    cos = tl.load(cos_ptr + position * (D // 2) + pair, mask=known, other=float("nan"))
    sin = tl.load(sin_ptr + position * (D // 2) + pair, mask=known, other=float("nan"))
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin  # float32, as the tables are
    q_row = q_ptr + ((sequence * heads + head) * T + step) * D
    store_pairs(q_row, turned_a, turned_b, head < heads, D, INTERLEAVED)
    k_head = head - heads
    k_row = k_ptr + ((sequence * kv_heads + k_head) * capacity + position) * D
    store_pairs(k_row, turned_a, turned_b, inside & (k_head >= 0) & (k_head < kv_heads), D, INTERLEAVED)
    v_head = k_head - kv_heads
    v_row = v_ptr + ((sequence * kv_heads + v_head) * capacity + position) * D
    store_pairs(v_row, a, b, inside & (v_head >= 0) & (v_head < kv_heads), D, INTERLEAVED)


def rope_append(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, cos: Tensor, sin: Tensor,
    layout: str = "half", block: int | None = None,
) -> Tensor:  # fmt: skip
    """Split the fused projection, rotate q and k, append k and v to the caches in place; returns q `[B, H, T, D]`.

    qkv       `[B T, (H + 2 Hkv) D]`, caches `[B, Hkv, capacity, D]`: one dtype of float16, bfloat16 and float32
    positions int64 `[B]`: where the first of a sequence's T new tokens goes. Outside the cache: q is NaN, see above
    cos, sin  float32 `[>= capacity, D / 2]`
    layout    "half": pairs (i, i + D/2); "interleaved": (2i, 2i + 1)
    block     heads that a program takes, a power of two; None: about 2048 numbers

    All contiguous. Raises ValueError or TypeError for anything else, H that Hkv does not divide included.
    """
    B, heads, kv_heads, T, D = _checked(qkv, k_cache, v_cache, positions, cos, sin)
    require(layout in LAYOUTS, f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    HALF = int(triton.next_power_of_2(D // 2))
    block = max(1, min(64, 1024 // HALF)) if block is None else block
    require(block >= 1 and block & (block - 1) == 0, f"block must be a power of two, got {block}")
    q = torch.empty((B, heads, T, D), dtype=qkv.dtype, device=qkv.device)
    grid = (B * T, triton.cdiv(heads + 2 * kv_heads, block))
    rope_append_kernel[grid](
        qkv, k_cache, v_cache, positions, cos, sin, q, T, heads, kv_heads, k_cache.shape[2],
        D=D, HALF=HALF, BLOCK=block, INTERLEAVED=layout == "interleaved",
    )  # fmt: skip
    return q


def _checked(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[int, int, int, int, int]:
    """(B, H, Hkv, T, D), or the error that `rope_append` promises."""
    shapes = f"got {tuple(qkv.shape)}, {tuple(k_cache.shape)}, {tuple(v_cache.shape)}, {tuple(positions.shape)}"
    fit = qkv.dim() == 2 and k_cache.dim() == 4 and k_cache.shape == v_cache.shape and qkv.numel() > 0
    require(
        fit and k_cache.numel() > 0 and positions.shape == k_cache.shape[:1],
        f"need qkv [B T, (H + 2 Hkv) D], caches [B, Hkv, capacity, D], positions [B]; {shapes}",
    )
    B, kv_heads, capacity, D = k_cache.shape
    heads = qkv.shape[1] // D - 2 * kv_heads
    whole = qkv.shape[0] % B == 0 and qkv.shape[1] % D == 0
    require(whole, f"qkv must have a multiple of {B} rows and of {D} columns, got {tuple(qkv.shape)}")
    require(heads > 0 and heads % kv_heads == 0, f"the {kv_heads} kv heads must divide the query heads, got {heads}")
    require(D % 2 == 0, f"D must be even, got {D}")
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 2 and table.shape[0] >= capacity and 2 * table.shape[1] == D
        require(fits, f"{name} must be [>= {capacity}, {D // 2}], got {tuple(table.shape)}")
    require_dtype(FLOATS, qkv=qkv)
    require_dtype((qkv.dtype,), k_cache=k_cache, v_cache=v_cache)
    require_dtype((torch.float32,), cos=cos, sin=sin)
    require_dtype((torch.int64,), positions=positions)
    tensors = {"qkv": qkv, "k_cache": k_cache, "v_cache": v_cache, "positions": positions, "cos": cos, "sin": sin}
    require_contiguous(**tensors)
    require_launchable(**tensors)
    return B, heads, kv_heads, qkv.shape[0] // B, D


def floor_bytes(tokens: int, heads: int, kv_heads: int, head_dim: int, itemsize: int = 2) -> int:
    """qkv read once; q, k and v written once. Tables and positions left out."""
    return 2 * itemsize * tokens * (heads + 2 * kv_heads) * head_dim


def naive_bytes(tokens: int, heads: int, kv_heads: int, head_dim: int, itemsize: int = 2) -> int:
    """The same for one operator after the other, as the file's docstring counts them."""
    return itemsize * tokens * head_dim * (10 * (heads + kv_heads) + 4 * kv_heads)


def turned(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """x [B, heads, T, D] turned by cos, sin [B, 1, T, D/2], by plain torch operators."""
    if layout == "half":
        a, b = x.chunk(2, dim=-1)
        cos, sin, other = cos.repeat(1, 1, 1, 2), sin.repeat(1, 1, 1, 2), torch.cat((-b, a), dim=-1)
    else:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + other * sin.to(x.dtype)


def by_torch(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, layout: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_append` by plain torch operators: (q, k_cache, v_cache), the caches written in place."""
    B, kv_heads, _, D = k_cache.shape
    rows = qkv.view(B, qkv.shape[0] // B, -1, D).transpose(1, 2)
    q, k, v = rows.split([rows.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    at = positions[:, None] + torch.arange(rows.shape[2], device=qkv.device)
    tables, sequence = (cos[at][:, None], sin[at][:, None]), torch.arange(B, device=qkv.device)[:, None]
    k_cache[sequence, :, at] = turned(k, *tables, layout).transpose(1, 2)
    v_cache[sequence, :, at] = v.transpose(1, 2)
    return turned(q, *tables, layout), k_cache, v_cache


def expected(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """What `run` gives, in float32 and in caches of its own, which are zeros elsewhere, as those of a case are."""
    zeros = (torch.zeros_like(cache, dtype=torch.float32) for cache in (k_cache, v_cache))
    return by_torch(qkv.float(), *zeros, *rest)


def run(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_append` with all that it writes as its result."""
    return rope_append(*arguments), arguments[1], arguments[2]


def llama_case(name: str, B: int, T: int, heads: int, kv_heads: int, layout: str = "half") -> Case:
    """New tokens in a layer of Llama, D = 128, bfloat16; each sequence's cache is filled to a different length."""
    capacity, D = T + max(1, T // 4), 128  # hardly more than is written: `bench` goes through inputs larger than the L2

    def inputs(device: torch.device) -> tuple:
        qkv = torch.empty((B * T, (heads + 2 * kv_heads) * D), dtype=torch.bfloat16, device=device)
        on_gpu = device.type == "cuda"
        make: Callable = torch.zeros if on_gpu else torch.empty
        caches = [make((B, kv_heads, capacity, D), dtype=torch.bfloat16, device=device) for _ in range(2)]
        frequencies = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)
        angles = torch.outer(torch.arange(capacity, device=device), frequencies)
        positions = torch.arange(B, device=device) * 31 % (capacity - T + 1)
        return qkv.normal_() if on_gpu else qkv, *caches, positions, angles.cos(), angles.sin(), layout

    return Case(
        name=name,
        inputs=inputs,
        run=run,
        expected=expected,
        bytes=floor_bytes(B * T, heads, kv_heads, D) + 4 * B * T * D + 8 * B,
        operations=3 * B * T * (heads + kv_heads) * D,
        kind="stream",
        peers={"torch": by_torch},
    )


CASES = [
    llama_case("8B, prefill 4 x 2048", 4, 2048, 32, 8),
    llama_case("8B, prefill 4 x 2048, interleaved", 4, 2048, 32, 8, "interleaved"),
    llama_case("8B, decode 256 sequences", 256, 1, 32, 8),
    llama_case("7B, prefill 4 x 2048", 4, 2048, 32, 32),
    llama_case("70B, prefill 4 x 2048", 4, 2048, 64, 8),
    llama_case("multi-query, decode 256 sequences", 256, 1, 32, 1),
]
