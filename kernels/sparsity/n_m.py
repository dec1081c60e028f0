"""2:4 sparsity in Triton: prune and compress in one pass, and a decode product that reads 9/16 of the dense bytes.

`prune_and_compress`, weight [N, K], 2 bytes a number:
    floor        2 N K bytes in, N K + N K / 8 out, no arithmetic that counts: memory bounds it
Fused: magnitudes, choice, gathering and packing. A mask that is stored and read again adds 2 N K bytes, and a second
read of the weight 2 N K more. A group of four is decided in registers: magnitude and position share one integer, so
eight maxima and minima find the two largest, ties included, without a sort.

`sparse_matmul`, y = x Wᵀ for the few tokens M of a decode step, values [N, K/2] and metadata [N, K/16]:
    operations   2 M N K, counted like those of the dense product that it replaces
    floor        N K + N K / 8 + 2 M (N + K) bytes; the dense product moves 2 N K + 2 M (N + K), at most 1.78 times that
Either side can be brought to the other. That decides the instructions, never the bytes:
    one token     x comes to the values. The four activations of a group are one 64-bit word, a position times 16 is a
                  shift, and nothing is multiplied by zero. The words serve all rows of the tile. Reading x[position]
                  from memory instead would take eight narrow loads for every 128-bit load of values.
    more tokens   the values go to x. Each is shifted to its slot of a 64-bit word, once for all tokens, and the tensor
                  cores multiply the dense tile. Triton has no sparse tensor-core instruction: half of this is by zero.
    a prompt      the same in larger tiles, so that the weight is expanded for 128 tokens at once. It waits for
                  operations, of which none is saved: what 2:4 saves here is memory, not time. To expand takes about as
                  long as to multiply (11 instructions of a thread for each number; counted, not timed).
Few rows and few tokens leave the warps of a program nothing to divide but the columns. So each takes a slice of them
(the batch axis of tl.dot), and these are added in a fixed order: no atomics, no second kernel, the same bits always.

Layout: metadata is row-major int16; group g of a word is the nibble lower | higher << 2 in bits 4g..4g+3, as
chapters/sparsity/n_m.py packs it; `to_cutlass` there gives the order of torch's own kernels. 16 divides K.
Format: Mishra et al. 2021, arXiv 2104.08378, section 3. Peers: cuBLAS on the dense weight, torch's semi-structured.
Other N:M, `matmul_n_m`: kernels/shared/n_m_tiles.py.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.shared import n_m_tiles
from kernels.shared.n_m_tiles import as_bits, matmul_n_m, members, slot

DTYPES = (torch.float16, torch.bfloat16)
WORD = 16  # columns that one metadata word describes: four groups of four
FEW = 16  # tokens of a decode step at the most; more are a prompt
SLICES = tl.constexpr(8)  # of the columns, in a program of `matmul_kernel`: one for each of its warps


@triton.jit
def largest_two(first, second, third, fourth):
    """Positions (lower, higher), int32, of the two largest magnitudes in groups of four 16-bit floats.

    The four members come as tiles of int16 bits of any one shape, which the two results share.
    A float's bits without the sign order as its magnitude (and NaN above infinity: it is kept and stays visible).
    That holds for float16 and bfloat16 alike; nothing here may depend on which of them it is.
    Below them goes 3 - position, so that of equal magnitudes the earlier wins. Zeros are the exception: a slot that
    has nothing to hold takes the first free of positions 2 and 3, so zeros at 0 and 1 rank below those.
    """
    a, b = first.to(tl.int32) & 0x7FFF, second.to(tl.int32) & 0x7FFF
    a, b = tl.where(a == 0, -1, a * 4 + 3), tl.where(b == 0, -2, b * 4 + 2)
    c, d = (third.to(tl.int32) & 0x7FFF) * 4 + 1, (fourth.to(tl.int32) & 0x7FFF) * 4
    left, right = tl.maximum(a, b), tl.maximum(c, d)
    best = 3 - (tl.maximum(left, right) & 3)
    runner_up = tl.maximum(tl.minimum(left, right), tl.maximum(tl.minimum(a, b), tl.minimum(c, d)))
    runner_up = 3 - (runner_up & 3)
    return tl.minimum(best, runner_up), tl.maximum(best, runner_up)


@triton.jit
def compress_kernel(weight, values, metadata, count, WORDS: tl.constexpr):
    """WORDS metadata words, of `count` in all; rows need no attention, because no word crosses one."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    live = word < count
    tile = tl.load(weight + word[:, None] * 16 + tl.arange(0, 16), mask=live[:, None], other=0)
    first, second, third, fourth = members(tl.reshape(tile, (WORDS, 4, 2, 2)))
    lower, higher = largest_two(first, second, third, fourth)
    group = as_bits(first) | as_bits(second) << 16 | as_bits(third) << 32 | as_bits(fourth) << 48
    kept = tl.join(slot(group, lower * 16, tl.int16), slot(group, higher * 16, tl.int16))
    tl.store(values + word[:, None] * 8 + tl.arange(0, 8), tl.reshape(kept, (WORDS, 8)), mask=live[:, None])
    nibbles = (lower | higher << 2) << (4 * tl.arange(0, 4))[None, :]
    tl.store(metadata + word, tl.sum(nibbles, axis=1).to(tl.int16), mask=live)


@triton.jit
def load_groups(values, metadata, at, live):
    """Values and nibbles of the words at `at` [R, W]: lower value, higher value, nibble, each [R, W, 4].

    Only the low four bits of a nibble count: above them stand the groups that follow it in its word.
    """
    kept = tl.load(values + at[:, :, None] * 8 + tl.arange(0, 8), mask=live[:, :, None], other=0.0)
    lower, higher = tl.split(tl.reshape(kept, (at.shape[0], at.shape[1], 4, 2)))
    word = tl.load(metadata + at, mask=live, other=0).to(tl.int32)
    return lower, higher, word[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :]


@triton.jit
def matvec_kernel(x, values, metadata, y, N, words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """y [N] = W x for one token x [16 words], ROWS rows a program; y in the dtype of x, float16 or bfloat16.

    Every number is turned into float32 before arithmetic; products and sums stay there and are rounded once, in y.
    values [N, 8 words], metadata [N, words] int16: words = K / 16, taken WORDS at a time; neither N nor words need
    fill a tile, and nothing outside the three operands is read. x is gathered, group by group, from 64-bit words that
    all rows share.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, WORDS, 4), tl.float32)
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        inside = word < words
        tile = tl.load(x + word[:, None] * 16 + tl.arange(0, 16), mask=inside[:, None], other=0.0)
        first, second, third, fourth = members(tl.reshape(tile, (WORDS, 4, 2, 2)))
        group = as_bits(first) | as_bits(second) << 16 | as_bits(third) << 32 | as_bits(fourth) << 48
        live = (row < N)[:, None] & inside[None, :]
        lower, higher, nibble = load_groups(values, metadata, row[:, None] * words + word[None, :], live)
        acc += lower.to(tl.float32) * slot(group[None], (nibble & 3) * 16, dtype).to(tl.float32)
        acc += higher.to(tl.float32) * slot(group[None], (nibble & 12) * 4, dtype).to(tl.float32)
    tl.store(y + row, tl.sum(tl.sum(acc, axis=2), axis=1).to(dtype), mask=row < N)


@triton.jit
def dense_tile(values, metadata, at, live, dtype: tl.constexpr):
    """The words at `at` [R, W] expanded to [R, 16 W]: each value is shifted to its slot of a 64-bit group."""
    lower, higher, nibble = load_groups(values, metadata, at, live)
    group = as_bits(lower) << (nibble & 3) * 16 | as_bits(higher) << (nibble & 12) * 4
    even = tl.join(slot(group, 0, tl.int16), slot(group, 32, tl.int16))
    odd = tl.join(slot(group, 16, tl.int16), slot(group, 48, tl.int16))
    bits = tl.reshape(tl.join(even, odd), (at.shape[0], at.shape[1] * 16))
    return bits.to(dtype, bitcast=True)  # not before: Triton 3.6 fails on a reshape that a product's operand comes from


@triton.jit
def matmul_kernel(x, values, metadata, y, M, N, words, ROWS: tl.constexpr, WORDS: tl.constexpr, TOKENS: tl.constexpr):
    """y [M, N] = x Wᵀ for ROWS rows and TOKENS tokens; SLICES runs of WORDS words are multiplied side by side."""
    dtype: tl.constexpr = x.dtype.element_ty
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    line = tl.arange(0, SLICES * ROWS)  # every row once per slice
    row = first_row + line % ROWS
    acc = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    for start in range(0, words, SLICES * WORDS):
        word = start + (line // ROWS * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
        live = (row < N)[:, None] & (word < words)
        dense = dense_tile(values, metadata, row[:, None] * words + word, live, dtype)
        column = start * 16 + tl.arange(0, SLICES)[:, None] * (WORDS * 16) + tl.arange(0, WORDS * 16)[None, :]
        inside = (column < words * 16)[:, :, None] & (token < M)[None, None, :]
        tile = tl.load(x + token[None, None, :] * (words * 16) + column[:, :, None], mask=inside, other=0.0)
        acc = tl.dot(dense.reshape(SLICES, ROWS, WORDS * 16), tile, acc)
    out = tl.trans(tl.sum(acc, axis=0)).to(dtype)
    row = first_row + tl.arange(0, ROWS)
    tl.store(y + token[:, None] * N + row[None, :], out, mask=(token < M)[:, None] & (row < N)[None, :])


@triton.jit
def prompt_kernel(x, values, metadata, y, M, N, words, ROWS: tl.constexpr, WORDS: tl.constexpr, TOKENS: tl.constexpr):
    """y [M, N] = x Wᵀ, a tile of ROWS rows and TOKENS tokens; WORDS words of each row are expanded at a time.

    Tiles of the same rows are neighbours: they read the weight from the cache, where only the first finds it absent.
    """
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, words, WORDS):
        word = (start + tl.arange(0, WORDS))[None, :]
        live = (row < N)[:, None] & (word < words)
        dense = dense_tile(values, metadata, row[:, None] * words + word, live, x.dtype.element_ty)
        column = start * 16 + tl.arange(0, WORDS * 16)
        inside = (token < M)[:, None] & (column < words * 16)[None, :]
        tile = tl.load(x + token[:, None] * (words * 16) + column[None, :], mask=inside, other=0.0)
        acc = tl.dot(tile, tl.trans(dense), acc)
    inside = (token < M)[:, None] & (row < N)[None, :]
    tl.store(y + token[:, None] * N + row[None, :], acc.to(y.dtype.element_ty), mask=inside)


def prune_and_compress(weight: Tensor, words: int = 256) -> tuple[Tensor, Tensor]:
    """The two largest magnitudes of every group of four, and where they stood; of equal ones the earlier.

    weight float16 or bfloat16 [N, K], contiguous, K divisible by 16. Returns values [N, K/2] of its dtype and metadata
    int16 [N, K/16], row-major. `words` metadata words make one program's tile. A NaN counts as the largest.
    Raises ValueError for the shape, TypeError for the dtype.
    """
    require(weight.dim() == 2, f"weight must be [N, K], got shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    require(columns % WORD == 0, f"weight has {columns} columns, not divisible by {WORD}")
    require_dtype(DTYPES, weight=weight)
    require_contiguous(weight=weight)
    require_launchable(weight=weight)
    values = torch.empty(rows, columns // 2, dtype=weight.dtype, device=weight.device)
    metadata = torch.empty(rows, columns // WORD, dtype=torch.int16, device=weight.device)
    count = metadata.numel()
    if count:
        bits = weight.view(torch.int16), values.view(torch.int16)
        compress_kernel[(triton.cdiv(count, words),)](*bits, metadata, count, WORDS=words, num_warps=4)
    return values, metadata


def sparse_matmul(
    x: Tensor, values: Tensor, metadata: Tensor, rows: int | None = None, words: int | None = None
) -> Tensor:
    """y = x Wᵀ [M, N] from the compressed W: x [M, K], values [N, K/2], metadata int16 [N, K/16], row-major.

    float16 or bfloat16, contiguous; sums in float32. Any number of tokens; from 17 on every 128 expand the weight
    again. `rows` and `words` set the tile instead of `configuration`.
    Raises ValueError for shapes that do not fit together, TypeError for the dtypes.
    """
    check_operands(x, values, metadata)
    (tokens, _), (outputs, count) = x.shape, metadata.shape
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = configuration(tokens, outputs, count)
    tile |= {"ROWS": rows or tile["ROWS"], "WORDS": words or tile["WORDS"]}
    blocks = triton.cdiv(outputs, tile["ROWS"])
    if tokens == 1:
        matvec_kernel[(blocks,)](x, values, metadata, y, outputs, count, **tile)
    elif tokens <= FEW:
        matmul_kernel[(blocks, 1)](x, values, metadata, y, tokens, outputs, count, **tile)
    else:
        grid = (triton.cdiv(tokens, tile["TOKENS"]), blocks)
        prompt_kernel[grid](x, values, metadata, y, tokens, outputs, count, **tile)
    return y


def check_operands(x: Tensor, values: Tensor, metadata: Tensor) -> None:
    """Refuse operands of `sparse_matmul` that do not fit together, naming the one at fault."""
    for name, operand in (("x", x), ("values", values), ("metadata", metadata)):
        require(operand.dim() == 2, f"{name} must have two axes, got shape {tuple(operand.shape)}")
    rows, count = metadata.shape
    fits = values.shape == (rows, count * WORD // 2)
    require(fits, f"values {tuple(values.shape)} do not fit metadata {tuple(metadata.shape)}: need [N, K/2], [N, K/16]")
    require(x.shape[1] == count * WORD, f"x has {x.shape[1]} columns, but the weight has {count * WORD}")
    require_dtype(DTYPES, x=x)
    require_dtype((x.dtype,), values=values)
    require_dtype((torch.int16,), metadata=metadata)
    require_contiguous(x=x, values=values, metadata=metadata)
    require_launchable(x=x, values=values, metadata=metadata)


def configuration(tokens: int, outputs: int, words: int) -> dict[str, Any]:
    """Launch constants: tiles small enough that a 4096-row weight makes about two programs per multiprocessor."""
    if tokens == 1:
        return {"ROWS": 8 if outputs >= 4096 else 2, "WORDS": min(128, triton.next_power_of_2(words)), "num_warps": 4}
    if tokens > FEW:
        warps, most = (4, 64) if tokens <= 64 else (8, 128)
        return {"ROWS": 64, "WORDS": 4, "TOKENS": most, "num_warps": warps, "num_stages": 3}
    block = 8 if tokens <= 8 else 16
    return {"ROWS": 16, "WORDS": 8, "TOKENS": block, "num_warps": SLICES.value, "num_stages": 2}


def dense_weight(values: Tensor, metadata: Tensor) -> Tensor:
    """The pruned weight [N, K] by plain torch operators."""
    nibbles = metadata.long()[..., None] >> torch.arange(0, 16, 4, device=metadata.device)
    index = torch.stack((nibbles & 3, nibbles >> 2 & 3), dim=-1)
    groups = torch.zeros(*nibbles.shape, 4, dtype=values.dtype, device=values.device)
    return groups.scatter_(-1, index, values.view(index.shape)).flatten(1)


def torch_compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`prune_and_compress` of a weight without zeros by plain torch operators."""
    groups = weight.unflatten(1, (-1, 4))
    index = groups.abs().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(dim=-1).values
    nibbles = (index[..., 0] | index[..., 1] << 2).unflatten(1, (-1, 4))
    metadata = (nibbles << torch.arange(0, 16, 4, device=weight.device)).sum(-1).to(torch.int16)
    return groups.gather(-1, index).flatten(1), metadata


def normal(rows: int, columns: int, device: torch.device) -> Tensor:
    """A bfloat16 matrix; `check` only compiles and needs no contents."""
    made = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    return made.normal_() if device.type == "cuda" else made


def normal_compressed(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A compressed weight [rows, columns]."""
    if device.type == "cuda":
        return prune_and_compress(normal(rows, columns, device))
    return normal(rows, columns // 2, device), torch.empty(rows, columns // WORD, dtype=torch.int16, device=device)


def matmul_case(tokens: int, outputs: int, columns: int) -> Case:
    """A decode product; operations are those of the dense product that it replaces."""
    return Case(
        name=f"matmul M={tokens} N={outputs} K={columns}",
        inputs=lambda device: (normal(tokens, columns, device), *normal_compressed(outputs, columns, device)),
        run=sparse_matmul,
        expected=lambda x, *weight: F.linear(x, dense_weight(*weight)),
        bytes=outputs * columns * 9 // 8 + 2 * tokens * (outputs + columns),
        operations=2 * tokens * outputs * columns,
        kind="stream" if tokens == 1 else "matrix",
        peers={"cuBLAS, dense": F.linear, "torch semi-structured": F.linear},
        prepare={
            "cuBLAS, dense": lambda x, *weight: (x, dense_weight(*weight)),
            "torch semi-structured": lambda x, *weight: (x, to_sparse_semi_structured(dense_weight(*weight))),
        },
    )


def general_case(tokens: int, n: int, m: int) -> Case:
    """The same product with another N:M, its positions packed."""
    outputs = columns = 4096
    kept, bits = columns * n // m, (m - 1).bit_length()

    def inputs(device: torch.device) -> tuple:
        packed = torch.empty(outputs // 4, bits, kept // 32, 4, dtype=torch.int32, device=device)
        if device.type == "cuda":
            packed.random_(-(2**31), 2**31)  # two values of a group may share a place: they add up
        return normal(tokens, columns, device), normal(outputs, kept, device), packed, n, m

    return Case(
        name=f"{n}:{m} M={tokens} N={outputs} K={columns}",
        inputs=inputs,
        run=matmul_n_m,
        expected=lambda x, *weight: F.linear(x, n_m_tiles.dense_weight(*weight)),
        bytes=outputs * kept * 2 + outputs * kept * bits // 8 + 2 * tokens * (outputs + columns),
        operations=2 * tokens * outputs * columns,
        kind="stream" if tokens == 1 else "matrix",
        peers={"cuBLAS, dense": F.linear},
        prepare={"cuBLAS, dense": lambda x, *weight: (x, n_m_tiles.dense_weight(*weight))},
    )


def compress_case(outputs: int, columns: int) -> Case:
    """Pruning and compressing one weight: comparisons, but no operations of a matrix product."""
    return Case(
        name=f"compress N={outputs} K={columns}",
        inputs=lambda device: (normal(outputs, columns, device),),
        run=prune_and_compress,
        expected=torch_compress,
        bytes=2 * outputs * columns + outputs * columns * 9 // 8,
        operations=0,
        kind="stream",
        peers={"torch": torch_compress},
    )


CASES = [
    *(matmul_case(tokens, outputs, 4096) for tokens in (1, 8) for outputs in (4096, 11008)),
    matmul_case(512, 11008, 4096),
    *(general_case(tokens, 4, 8) for tokens in (1, 16, 512)),
    general_case(1, 1, 4),
    compress_case(4096, 11008),
]
