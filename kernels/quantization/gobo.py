"""Codebook product x @ Wᵀ: W is 3 bits a weight into a table of 8 values, and a few outliers; also 1, 2 and 4 bits.

Fused: unpacking, the lookup, the product, and the outliers, which are added before the result is written. The table
is in shared memory, each value in a bank of its own: a lookup is one load there, which never waits for another thread.

    bytes        N K b / 8 + 4 N + 4 N o + 2 M (K + N)    codes; starts of rows; o outliers a row, 2 bytes for the
                                                          value and 2 for the column; activations
    operations   2 M N K                                  floor: the larger of bytes / bandwidth, operations / rate
Replaces centroids[codes] in 16 bits, x @ W.T and a sparse product: 4.4 N K bytes if W is unpacked for the call, and
4 M N more, because the sparse product reads the result and writes it again.

One row of x    `matvec_kernel`: each program takes all of K for a few rows of W. The outliers of those rows come
                first: they are few, so their activations are gathered one by one, from the cache.
2 to 16 rows    `matmul_kernel`: tiles for the tensor cores, then the outliers in the same way.
more            the same kernel; but as many gathers for every token would move more than the product itself. Here
                outliers go to the weights: each row keeps a cursor in its list, which is in the order of columns.
                While some row has an outlier in the tile at hand, one of every such row is added to it, before the
                tensor cores take the tile. A prompt waits for arithmetic and gains nothing from few bits.
No atomics: the result is the same to the last bit in every run.

Instructions, not bytes, are what one row waits for: the loop has 4.9 per weight (triton 3.7.1, bfloat16, sm_90;
counted, not timed), shift, AND, lookup, multiply-add and 0.9 for all else. A lookup occupies shared memory for as long
as four other instructions take, so that lookups alone need more time than a 3-bit weight takes to arrive.

Layout: packed `[N/4, b, K/32, 4]` int32, the fields of chapters/shared/bit_fields.py: word w of 32 columns of row
4 q + r is packed[q, w, u, r]. A thread loads the same word of four rows at once, 128 bits, and needs the activations
of 32 columns for all four. N and K are padded to multiples of 4 and 32, in packed alone.
Method: Zadeh et al. 2020, arXiv 2005.03842, whose own hardware adds up the activations of each centroid instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable
from kernels.quantization.weight_only import by_place

FIELD = tl.constexpr(32)  # columns of one field
BEYOND = tl.constexpr(1 << 30)  # the column of the outlier after the last
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def load_nibbles(packed_ptr, at, plane, live, BITS: tl.constexpr):
    """Four words for each field, [.., 4 rows] -> [.., 4 rows, 4 words]: the low BITS bits of nibble i of word w are
    column 4 i + w. What is above them is of no account. at: offsets of word 0, plane: from a word to the next."""
    zero = tl.load(packed_ptr + at, mask=live, other=0)
    one, two, three = zero >> 1, zero >> 2, zero >> 3
    if BITS > 1:
        one = tl.load(packed_ptr + at + plane, mask=live, other=0)
        three = one >> 2
    if BITS > 2:
        two = tl.load(packed_ptr + at + 2 * plane, mask=live, other=0)
        three = zero >> 3 & 0x11111111 | one >> 2 & 0x22222222 | two >> 1 & 0x44444444
    if BITS > 3:
        three = tl.load(packed_ptr + at + 3 * plane, mask=live, other=0)
    words = tl.join(tl.join(zero, two), tl.join(one, three))
    return words.reshape(at.shape[0], at.shape[1], 4, 4)


@triton.jit
def looked_up(table, code):
    """table [2^bits], code of any shape -> table[code] in that shape."""
    return tl.gather(table, code.reshape(code.numel), 0).reshape(code.shape)


@triton.jit
def matvec_kernel(
    x_ptr, packed_ptr, centroid_ptr, start_ptr, column_ptr, extra_ptr, out_ptr, N, K, fields,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R quads of rows of W times the vector x, BLOCK_F fields of 32 columns at a time."""
    quad = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    begin = tl.load(start_ptr + row, mask=row < N, other=0)
    end = tl.load(start_ptr + row + 1, mask=row < N, other=0)
    outliers = tl.zeros((BLOCK_R, 4, BLOCK_O), tl.float32)
    for first in range(0, tl.max(end - begin), BLOCK_O):
        at = begin[:, :, None] + first + tl.arange(0, BLOCK_O)[None, None, :]
        inside = at < end[:, :, None]
        column = tl.load(column_ptr + at, mask=inside, other=0).to(tl.int32)
        x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        outliers += x * tl.load(extra_ptr + at, mask=inside, other=0.0).to(tl.float32)
    table = tl.load(centroid_ptr + tl.arange(0, 1 << BITS)).to(tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_F, 4, 4), tl.float32)  # [quad, field, row, word]
    for first in range(0, fields, BLOCK_F):
        field = first + tl.arange(0, BLOCK_F)
        live = ((quad * 4 < N)[:, None] & (field < fields)[None, :])[:, :, None]
        at = (quad[:, None] * BITS * fields + field[None, :])[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        words = load_nibbles(packed_ptr, at, fields * 4, live, BITS)
        column = field[:, None] * FIELD + tl.arange(0, FIELD)[None, :]
        x = by_place(tl.load(x_ptr + column, mask=column < K, other=0.0))
        for place in tl.static_range(8):
            weight = looked_up(table, words >> 4 * place & (1 << BITS) - 1)
            acc += weight * x[place].to(tl.float32)[None, :, None, :]
    out = tl.sum(tl.sum(acc, axis=3), axis=1) + tl.sum(outliers, axis=2)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def outlier_at(column_ptr, extra_ptr, cursor, end):
    """(column, extra) of each row's outlier at its cursor; beyond all columns where the row has no more."""
    column = tl.load(column_ptr + cursor, mask=cursor < end, other=0).to(tl.int32)
    extra = tl.load(extra_ptr + cursor, mask=cursor < end, other=0.0).to(tl.float32)
    return tl.where(cursor < end, column, BEYOND), extra


@triton.jit
def matmul_kernel(
    x_ptr, packed_ptr, centroid_ptr, start_ptr, column_ptr, extra_ptr, out_ptr, M, N, K, fields,
    BITS: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of x times 4 BLOCK_R rows of W, 32 BLOCK_F columns at a time."""
    BLOCK_N: tl.constexpr = 4 * BLOCK_R
    BLOCK_K: tl.constexpr = FIELD * BLOCK_F
    quad = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cursor = tl.load(start_ptr + row, mask=row < N, other=0)
    end = tl.load(start_ptr + row + 1, mask=row < N, other=0)
    next_column, next_extra = outlier_at(column_ptr, extra_ptr, cursor, end)
    table = tl.load(centroid_ptr + tl.arange(0, 1 << BITS)).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, fields, BLOCK_F):
        field = first + tl.arange(0, BLOCK_F)
        column = first * FIELD + tl.arange(0, BLOCK_K)
        inside = (token < M)[:, None] & (column < K)[None, :]
        x = tl.load(x_ptr + token[:, None] * K + column[None, :], mask=inside, other=0.0)
        live = ((quad * 4 < N)[:, None] & (field < fields)[None, :])[:, :, None]
        at = (quad[:, None] * BITS * fields + field[None, :])[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        words = load_nibbles(packed_ptr, at, fields * 4, live, BITS)  # [quad, field, row, word]
        codes = words[:, :, :, None, :] >> (4 * tl.arange(0, 8))[:, None] & (1 << BITS) - 1
        weight = looked_up(table, codes).permute(0, 2, 1, 3, 4).reshape(BLOCK_N, BLOCK_K)
        beyond = (first + BLOCK_F) * FIELD
        if not FEW:
            while tl.min(next_column) < beyond:
                weight += tl.where(next_column[:, None] == column[None, :], next_extra[:, None], 0.0)
                cursor += (next_column < beyond).to(tl.int32)
                next_column, next_extra = outlier_at(column_ptr, extra_ptr, cursor, end)
        acc = tl.dot(x, tl.trans(weight.to(x.dtype)), acc, input_precision="ieee")
    if FEW:
        while tl.min(next_column) < BEYOND:
            at = token[:, None] * K + next_column[None, :]
            x = tl.load(x_ptr + at, mask=(token < M)[:, None] & (cursor < end)[None, :], other=0.0)
            acc += x.to(tl.float32) * next_extra[None, :]
            cursor += 1
            next_column, next_extra = outlier_at(column_ptr, extra_ptr, cursor, end)
    out_ptr += token[:, None] * N + row[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=(token < M)[:, None] & (row < N)[None, :])


def configuration(M: int, K: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Tiles, warps and pipeline stages for one shape: `rows` of W in quads, `fields` of 32 columns, `tokens` of x."""
    if M == 1:
        fields = min(128, 1 << (-(-K // FIELD.value) - 1).bit_length())
        return {"tokens": 1, "rows": 2, "fields": fields, "warps": 4, "stages": 1}
    if dtype is torch.float32:  # no tensor cores: tiles that fit the registers
        return {"tokens": 16, "rows": 8, "fields": 1, "warps": 4, "stages": 2}
    if M <= 16:
        return {"tokens": 16, "rows": 8, "fields": 8, "warps": 4, "stages": 3}
    return {"tokens": 64 if M <= 64 else 128, "rows": 32, "fields": 2, "warps": 8, "stages": 3}


def codebook_matmul(
    x: Tensor, packed: Tensor, centroids: Tensor, start: Tensor, column: Tensor, extra: Tensor, **blocks: int
) -> Tensor:
    """x `[M, K]` times the transpose of the weights `[N, K]` that the rest stands for: `[M, N]`.

    x          float16, bfloat16 or float32 (IEEE products, slow: for tests)
    packed     int32 `[⌈N/4⌉, bits, ⌈K/32⌉, 4]` in the layout above, bits 1 to 4
    centroids  `[2^bits]`, and extra `[outliers]`, of the dtypes of x: each its own
    start      int32 `[N + 1]`: row r adds extra[i] in column[i] to its centroids, start[r] ≤ i < start[r + 1]
    column     int16 `[outliers]`, ascending within each row and below K. This is not checked: it would take a pass
    blocks     parts of `configuration` to replace: tokens, rows, fields, powers of two

    All contiguous. Sums are float32; for M > 1 a weight is rounded to x's dtype before the product. The result has x's
    dtype. Raises ValueError or TypeError for anything else.
    """
    (M, N, K), bits = _checked(x, packed, centroids, start, column, extra), packed.shape[1]
    chosen = configuration(M, K, x.dtype) | blocks
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    arguments = (x, packed, centroids, start, column, extra, out)
    meta: dict[str, Any] = {"BITS": bits, "BLOCK_R": chosen["rows"], "BLOCK_F": chosen["fields"]}
    meta |= {"num_warps": chosen["warps"], "num_stages": chosen["stages"]}
    blocks_of_rows = triton.cdiv(N, 4 * chosen["rows"])
    if M == 1:
        matvec_kernel[(blocks_of_rows,)](*arguments, N, K, packed.shape[2], **meta, BLOCK_O=16)
    else:
        grid = (blocks_of_rows, triton.cdiv(M, chosen["tokens"]))
        matmul_kernel[grid](*arguments, M, N, K, packed.shape[2], **meta, FEW=M <= 16, BLOCK_M=chosen["tokens"])
    return out


def _checked(
    x: Tensor, packed: Tensor, centroids: Tensor, start: Tensor, column: Tensor, extra: Tensor
) -> tuple[int, int, int]:
    """(M, N, K), or the error that `codebook_matmul` promises."""
    require(x.dim() == 2 and packed.dim() == 4, f"x and packed must have 2 and 4 axes, got {x.dim()}, {packed.dim()}")
    (M, K), N, bits = x.shape, len(start) - 1, packed.shape[1]
    require(min(M, N, K) > 0, f"x and start must not be empty, got {tuple(x.shape)} and {len(start)}")
    require(1 <= bits <= 4, f"packed must have 1 to 4 bits, got {bits}")
    shape = (-(-N // 4), bits, -(-K // FIELD.value), 4)
    require(tuple(packed.shape) == shape, f"packed must be {shape} for N={N}, K={K}, got {tuple(packed.shape)}")
    require(len(centroids) == 2**bits, f"centroids must be 2^{bits}, got {len(centroids)}")
    require(len(column) == len(extra), f"column and extra must be as many, got {len(column)} and {len(extra)}")
    require_dtype(DTYPES, x=x, centroids=centroids, extra=extra)
    require_dtype((torch.int32,), packed=packed, start=start)
    require_dtype((torch.int16,), column=column)
    tensors = {"x": x, "packed": packed, "centroids": centroids, "start": start, "column": column, "extra": extra}
    require_contiguous(**tensors)
    require_launchable(**tensors)
    return M, N, K


def dequantize(
    packed: Tensor, centroids: Tensor, start: Tensor, column: Tensor, extra: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weights `[N, columns]` in dtype by plain torch operators, rounded as in `matmul_kernel`."""
    words, rows, bits = packed.unbind(1), len(start) - 1, packed.shape[1]
    if bits < 3:
        words = [words[code % bits] >> (code // bits * bits) for code in range(4)]
    if bits == 3:
        words = [*words, sum(words[bit] >> (3 - bit) & (0x11111111 << bit) for bit in range(3))]
    codes = torch.stack([word >> 4 * place & 2**bits - 1 for place in range(8) for word in words], dim=-1)
    weight = centroids.float()[codes.transpose(1, 2).reshape(4 * len(packed), -1)[:rows, :columns]]
    row = torch.arange(rows, device=packed.device).repeat_interleave(start.diff())
    return weight.index_put_((row, column.long()), extra.float(), accumulate=True).to(dtype)


def arguments(M: int, N: int, K: int, bits: int, device: torch.device) -> tuple:
    """Those of `codebook_matmul`, with contents on a GPU only; every 512th weight is an outlier."""
    outliers = K // 512
    shapes = {
        torch.int32: [(N // 4, bits, K // 32, 4), (N + 1,)],
        torch.bfloat16: [(M, K), (2**bits,), (N * outliers,)],
    }
    packed, start = (torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes[torch.int32])
    x, centroids, extra = (torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes[torch.bfloat16])
    column = torch.empty(N * outliers, dtype=torch.int16, device=device)
    if device.type == "cuda":
        packed.random_(-(2**31), 2**31)
        torch.arange(0, N * outliers + 1, outliers, out=start)
        x.normal_()
        centroids.copy_(torch.linspace(-0.03, 0.03, 2**bits))
        extra.normal_(std=0.05)
        column.view(N, outliers).copy_(torch.randint(K, (N, outliers), device=device).sort(dim=1).values)
    return x, packed, centroids, start, column, extra


def dense_arguments(x: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same weights as cuBLAS wants them: (x, W), both in x's dtype."""
    return x, dequantize(*weight, x.shape[1], x.dtype)


def llama_case(M: int, N: int, K: int, bits: int = 3) -> Case:
    """A linear layer of a Llama model, bfloat16 activations."""
    return Case(
        name=f"{M} x {K} to {N}, {bits} bits",
        inputs=lambda device: arguments(M, N, K, bits, device),
        run=codebook_matmul,
        expected=lambda *a: F.linear(*dense_arguments(*a)),
        bytes=N * K * bits // 8 + 4 * (N + 1) + N * K // 512 * 4 + 2 * 2**bits + 2 * M * (K + N),
        operations=2 * M * N * K,
        kind="stream" if M == 1 else "matrix",
        peers={"cuBLAS bf16": F.linear},
        prepare={"cuBLAS bf16": dense_arguments},
    )


CASES = [llama_case(M, N, 4096) for N in (4096, 11008) for M in (1, 16, 512)] + [llama_case(1, 4096, 11008, 4)]
