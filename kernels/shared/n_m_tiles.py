"""Products with N:M weights of any N and M in Triton: values and packed positions in, no dense weight in memory.

(The first three functions, of a group's four members and their bits, are for kernels/sparsity/n_m.py.)

y = x Wᵀ for M tokens, W [O, K] as values [O, k] of k = K n/m numbers a row and positions in b = ⌈log2 m⌉ bits each:
    floor        O k (2 + b/8) + 2 M (K + O) bytes; the dense product moves 2 O K + 2 M (K + O)
    operations   2 M O K, counted like those of the dense product that it replaces
What is saved are bytes of the weight. Of operations nothing is saved by more than one token, because tensor cores want
dense tiles and Triton has no sparse instruction: m/n - 1 products by zero for each that counts. So one token, which
waits for the weight, gains up to m/n; a long prompt, which waits for arithmetic, gains nothing but the memory.

`gather_kernel`, one token: position tells each value its activation, which is gathered. A warp's gather falls on few
neighbouring activations, in the first-level cache; products by zero are not made. In 4:8 a warp reads from 8 lines
at a time, so that the gather may take longer than the weight's bytes.
`expand_kernel`, more: on chip each value is put where its position says, by n comparisons for every dense number, and
tl.dot multiplies the tile. A weight that is expanded in memory first moves 2 O k + 4 O K bytes before the product.
Not yet good: at 4:8 a thread spends 40 instructions on each dense number (triton 3.7.1, sm_90; counted, not timed), on
an H200 five times what the bytes of few tokens take, and four times the products of 128. 2:4's own form takes 8.

Layout: packed [⌈O/4⌉, b, ⌈k/32⌉, 4] int32, the fields of chapters/shared/bit_fields.py, in which a thread loads the
same word of four rows at once. n and m are powers of two. 2:4 has a form of its own, torch's: kernels/sparsity/n_m.py.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.quantization.gobo import load_nibbles

DTYPES = (torch.float16, torch.bfloat16)
FIELD = tl.constexpr(32)  # values whose positions lie in one field
MOST = {"n": (1, 2, 4, 8), "m": (2, 4, 8, 16)}


@triton.jit
def members(tile):
    """The four members of each group: [..., 2, 2] -> four tiles [...]."""
    even, odd = tl.split(tile)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def as_bits(tile):
    """16-bit numbers as the low 16 bits of an int64."""
    return tile.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF


@triton.jit
def slot(word, shift, dtype: tl.constexpr):
    """The 16-bit number that starts at bit `shift` of a 64-bit word."""
    return (word >> shift).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def load_positions(packed, quad, field, live, fields, BITS: tl.constexpr):
    """Positions of the values in fields [F] of the rows of quads [Q]: int32 [4 Q, 32 F]."""
    at = (quad[:, None] * BITS * fields + field[None, :])[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    words = load_nibbles(packed, at, fields * 4, live[:, :, None], BITS)  # [quad, field, row, word]
    codes = words[:, :, :, None, :] >> (4 * tl.arange(0, 8))[:, None] & ((1 << BITS) - 1)
    return codes.permute(0, 2, 1, 3, 4).reshape(4 * quad.shape[0], FIELD * field.shape[0])


@triton.jit
def expand(values, position, N: tl.constexpr, M: tl.constexpr):
    """Values and positions [R, G N], N of each group -> the dense tile [R, G, M], 0 where no value stood.

    Values of even and odd slots are expanded apart, down to one for a group, and added: no two share a place.
    """
    if N == 1:
        place = tl.arange(0, M)[None, None, :]
        return tl.where(position[:, :, None] == place, values[:, :, None], 0.0).to(values.dtype)
    else:
        half: tl.constexpr = values.shape[1] // 2
        even, odd = tl.split(values.reshape(values.shape[0], half, 2))
        first, second = tl.split(position.reshape(values.shape[0], half, 2))
        return expand(even, first, N // 2, M) + expand(odd, second, N // 2, M)


@triton.jit
def load_fields(
    values, packed, start, quad, row, rows, kept, fields, BITS: tl.constexpr, FIELDS: tl.constexpr
):  # fmt: skip
    """FIELDS fields from `start` on: values, positions [4 Q, FIELD FIELDS], places in a row, and which exist."""
    field = start + tl.arange(0, FIELDS)
    inside = (quad * 4 < rows)[:, None] & (field < fields)[None, :]
    position = load_positions(packed, quad, field, inside, fields, BITS)
    at = start * FIELD + tl.arange(0, FIELD * FIELDS)
    live = (row < rows)[:, None] & (at < kept)[None, :]
    return tl.load(values + row[:, None] * kept + at[None, :], mask=live, other=0.0), position, at, live


@triton.jit
def gather_kernel(
    x, values, packed, y, rows, kept, fields,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, QUADS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """y [rows] = W x for one token, 4 QUADS rows a program, FIELDS fields at a time; sums in float32."""
    quad = tl.program_id(0).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    row = tl.program_id(0).to(tl.int64) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    acc = tl.zeros((4 * QUADS, FIELD * FIELDS), tl.float32)
    for start in range(0, fields, FIELDS):
        value, position, at, live = load_fields(values, packed, start, quad, row, rows, kept, fields, BITS, FIELDS)
        column = (at // N * M)[None, :] + position
        acc += value.to(tl.float32) * tl.load(x + column, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row, tl.sum(acc, axis=1).to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def expand_kernel(
    x, values, packed, y, tokens, rows, kept, fields,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr,
    QUADS: tl.constexpr, FIELDS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = x Wᵀ, a tile of 4 QUADS rows and TOKENS tokens, FIELDS fields of values at a time."""
    ROWS: tl.constexpr = 4 * QUADS
    COLUMNS: tl.constexpr = FIELD * FIELDS * M // N
    quad = tl.program_id(1).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    K = kept // N * M
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, fields, FIELDS):
        value, position, _, _ = load_fields(values, packed, start, quad, row, rows, kept, fields, BITS, FIELDS)
        weight = expand(value, position, N, M).reshape(ROWS, COLUMNS)
        column = start * (FIELD * M // N) + tl.arange(0, COLUMNS)
        inside = (token < tokens)[:, None] & (column < K)[None, :]
        tile = tl.load(x + token[:, None] * K + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(tile, tl.trans(weight), acc)
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(y + token[:, None] * rows + row[None, :], acc.to(y.dtype.element_ty), mask=inside)


def matmul_n_m(
    x: Tensor, values: Tensor, packed: Tensor, n: int, m: int, quads: int | None = None, fields: int | None = None
) -> Tensor:
    """y = x Wᵀ [M, O] from an n:m weight: x [M, K], values [O, K n/m], packed int32 [⌈O/4⌉, ⌈log2 m⌉, ⌈K n/m / 32⌉, 4].

    float16 or bfloat16, contiguous; sums in float32. n is 1, 2, 4 or 8, m 2, 4, 8 or 16. `quads` of rows and `fields`
    set the tile instead of `tile_of`. Raises ValueError for shapes that do not fit together and for another n or m,
    TypeError for the dtypes.
    """
    check_operands(x, values, packed, n, m)
    (tokens, _), (outputs, kept) = x.shape, values.shape
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = tile_of(tokens, outputs, n, m)
    tile |= {"N": n, "M": m, "BITS": packed.shape[1]}
    tile |= {"QUADS": quads or tile["QUADS"], "FIELDS": fields or tile["FIELDS"]}
    blocks, sizes = triton.cdiv(outputs, 4 * tile["QUADS"]), (outputs, kept, packed.shape[2])
    if tokens == 1:
        gather_kernel[(blocks,)](x, values, packed, y, *sizes, **tile)
    else:
        grid = (triton.cdiv(tokens, tile["TOKENS"]), blocks)  # tiles of the same rows are neighbours, and share them
        expand_kernel[grid](x, values, packed, y, tokens, *sizes, **tile)
    return y


def tile_of(tokens: int, outputs: int, n: int, m: int) -> dict[str, Any]:
    """Launch constants. A field of values is 32 m/n columns: the sparser, the fewer rows fill the same tile."""
    if tokens == 1:
        return {"QUADS": 2 if outputs >= 4096 else 1, "FIELDS": 8, "num_warps": 4}
    if tokens <= 16:
        fields = 2 if 2 * n >= m else 1
        return {"QUADS": max(1, min(4, 32 * n // m)), "FIELDS": fields, "TOKENS": 16, "num_warps": 4, "num_stages": 3}
    return {"QUADS": max(1, 32 * n // m), "FIELDS": 1, "TOKENS": 128, "num_warps": 8, "num_stages": 2}


def check_operands(x: Tensor, values: Tensor, packed: Tensor, n: int, m: int) -> None:
    """Refuse operands of `matmul_n_m` that do not fit together, naming the one at fault."""
    require(n in MOST["n"] and m in MOST["m"] and n <= m, f"need n of {MOST['n']} up to m of {MOST['m']}, got {n}:{m}")
    require(x.dim() == values.dim() == 2, f"x and values must have two axes, got {[*x.shape]} and {[*values.shape]}")
    outputs, kept = values.shape
    require(kept % n == 0, f"values have {kept} columns, not divisible by n={n}")
    shape = (-(-outputs // 4), (m - 1).bit_length(), -(-kept // FIELD.value), 4)
    require(packed.shape == shape, f"packed must be {[*shape]} for values {[*values.shape]}, got {[*packed.shape]}")
    require(x.shape[1] == kept // n * m, f"x has {x.shape[1]} columns, but the weight has {kept // n * m}")
    require_dtype(DTYPES, x=x)
    require_dtype((x.dtype,), values=values)
    require_dtype((torch.int32,), packed=packed)
    require_contiguous(x=x, values=values, packed=packed)
    require_launchable(x=x, values=values, packed=packed)


def dense_weight(values: Tensor, packed: Tensor, n: int, m: int) -> Tensor:
    """The weight [O, K] that values and positions stand for, by torch operators; values that share a place add up."""
    bits = packed.shape[1]
    words = list(packed.unbind(1))
    if bits < 3:
        words = [words[code % bits] >> (code // bits * bits) for code in range(4)]
    elif bits == 3:
        words.append(sum(words[bit] >> (3 - bit) & (0x11111111 << bit) for bit in range(3)))
    codes = torch.stack([word >> 4 * i & (2**bits - 1) for i in range(8) for word in words], -1)
    index = codes.swapaxes(1, 2).flatten(0, 1).flatten(1)[: len(values), : values.shape[1]].long()
    groups = torch.zeros(len(values), values.shape[1] // n, m, dtype=values.dtype, device=values.device)
    return groups.scatter_add_(-1, index.unflatten(1, (-1, n)), values.unflatten(1, (-1, n))).flatten(1)
