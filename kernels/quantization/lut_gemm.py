"""The product of LUT-GEMM for one row of x: y = Σ_p alpha_p (sign_p · x) (+ offset Σ x), from planes of packed signs.

Fused: reading bits as signs, the sums of ±x, their scales. The weights cross the memory bus once, one bit per plane.

    bytes        P N K / 8  +  2 P N K / g  (+ 2 N K / g)  +  2 (K + N)       signs, scales, offsets, activations
    operations   P N K additions                                            floor: bytes / bandwidth
Replaces x @ dequantize(W).T, which moves 4 N K bytes and more if W is expanded for the call, 2 N K if kept in 16 bits.

The paper looks up: a block tables all 256 signed sums of each eight activations in shared memory, and a byte of signs
is an index. One address, load and addition serve eight signs, where multiplying needs more than two instructions for
each. What tables cost: the threads of a warp look up at random, so that of 32 banks the busiest serves about 3.5 of 32
look-ups, 73 signs in a clock of a multiprocessor; and a block must walk thousands of rows to pay for its tables, so K
is split, and partial sums are added atomically, in another order every time. Triton's `tl.gather` would, besides, store
the table anew at every call.

This kernel has no table: a sign is a predicate. Sum of ±x = 2 · (sum of x where the bit is set) − sum of x, and the
second sum is the same for all rows and planes. For each sign there remain the test of a bit and one addition that
happens or does not:

    flip the sign bit of x       shift, AND-XOR, add        3.7 machine instructions per sign, all included
    select x or 0                test, select, add          3.8 (triton 3.7.1, bfloat16, 3 planes, sm_90; counted in
    add x or not: this kernel    test, predicated add       2.8  the code, not timed; 2.8 on sm_80, too)

That is 46 signs in a clock of a multiprocessor, of four schedulers for 32 threads each, where an H200 could read 145:
3 planes take as long as reading 9.5 bits per weight, not 3.4, and so 0.6 of the time of 16 bits. Tables would do
better by half, if all their costs but the banks were nothing. Expanding signs to ±1.0 for tensor cores was compiled,
too: 2.5 instructions on sm_90 before splitting K, and 4.7 on sm_80. Nothing here is bound by memory; a uniform grid in
4 bits (weight_only) is cheaper to unpack than 4 planes, and that is what planes pay for values of any spacing.

Layout: packed int32 `[P, ceil(N / 4), K / 32, 4]`. Bit j of word [p, r, w, i], the lowest first, is plane p of row
4 r + i and column 32 w + j: a thread's 128-bit load are 32 columns of four rows, which meet the same 32 activations,
held in registers. alpha `[N, K / g, P]`, offset `[N, K / g]`; g, a multiple of 32, divides K.
Method: Park et al. 2022, arXiv 2206.09557, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def split_each(parts):
    """Tensors [BLOCK_W, n] -> twice as many [BLOCK_W, n / 2]: the even columns of each, then the odd ones of each."""
    evens = ()
    odds = ()
    for i in tl.static_range(len(parts)):
        even, odd = tl.split(parts[i].reshape(parts[i].shape[0], parts[i].shape[1] // 2, 2))
        evens += (even,)
        odds += (odd,)
    return evens + odds


@triton.jit
def by_column(x):
    """x [BLOCK_W, 32] -> its 32 columns, each [1, BLOCK_W, 1]: after five halvings, place j holds column j."""
    parts = (x,)
    for _ in tl.static_range(5):
        parts = split_each(parts)
    columns = ()
    for j in tl.static_range(32):
        columns += (parts[j].reshape(1, x.shape[0], 1),)
    return columns


@triton.jit
def matvec_kernel(
    x_ptr, packed_ptr, alpha_ptr, offset_ptr, out_ptr, N, words, groups,
    GROUP_WORDS: tl.constexpr, PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: 4 BLOCK_R rows of W times x, BLOCK_W words of 32 columns at a time. offset_ptr may be None."""
    four = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = (four[:, None] * 4 + tl.arange(0, 4)[None, :])[:, None, :]  # [BLOCK_R, 1, 4]
    fours = (N + 3) // 4
    acc = tl.zeros((BLOCK_R, BLOCK_W, 4), tl.float32)
    for start in range(0, words, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        live = word < words
        x = tl.load(x_ptr + word[:, None] * 32 + tl.arange(0, 32)[None, :], mask=live[:, None], other=0.0)
        x = by_column(x.to(tl.float32))
        total = x[0]
        for j in tl.static_range(1, 32):
            total += x[j]
        group = row.to(tl.int64) * groups + (word // GROUP_WORDS)[None, :, None]
        scaled = (row < N) & live[None, :, None]
        rest = tl.zeros((BLOCK_R, BLOCK_W, 4), tl.float32)  # what the sum of x is multiplied by
        if offset_ptr is not None:
            rest += tl.load(offset_ptr + group, mask=scaled, other=0.0).to(tl.float32)
        for plane in tl.static_range(PLANES):
            held = (four < fours)[:, None] & live[None, :]
            address = (plane * fours + four).to(tl.int64)[:, None] * words + word[None, :]
            address = address[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
            bits = tl.load(packed_ptr + address, mask=held[:, :, None], other=0)
            alpha = tl.load(alpha_ptr + group * PLANES + plane, mask=scaled, other=0.0).to(tl.float32)
            dot = tl.zeros((BLOCK_R, BLOCK_W, 4), tl.float32)
            for j in tl.static_range(32):
                dot = tl.where(bits >> j & 1 != 0, dot + x[j], dot)
            acc += 2 * alpha * dot
            rest -= alpha
        acc += rest * total
    out = tl.sum(acc, axis=1)
    row = four[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)


def lut_gemm(x: Tensor, packed: Tensor, alpha: Tensor, offset: Tensor | None, group_size: int, **blocks: int) -> Tensor:
    """x `[1, K]` times the transpose of the weights `[N, K]` that packed, alpha and offset stand for: `[1, N]`.

    x       float16, bfloat16 or float32, contiguous
    packed  int32 `[planes, ceil(N / 4), K / 32, 4]` in the layout above, contiguous
    alpha   float16, bfloat16 or float32 `[N, K / group_size, planes]`, contiguous
    offset  the same dtypes, `[N, K / group_size]`, contiguous; None: zeros
    blocks  block_r, block_w: rows / 4 and words of 32 columns that a program takes at a time, powers of two

    Sums are float32, the result has x's dtype. For more rows of x, expand the weights instead.
    Raises ValueError or TypeError for anything else.
    """
    N, K = _checked(x, packed, alpha, offset, group_size)
    chosen = {"block_r": 2, "block_w": min(128, triton.next_power_of_2(K // 32))} | blocks
    out = torch.empty((1, N), dtype=x.dtype, device=x.device)
    matvec_kernel[(triton.cdiv(N, 4 * chosen["block_r"]),)](
        x, packed, alpha, offset, out, N, K // 32, K // group_size,
        GROUP_WORDS=group_size // 32, PLANES=len(packed), BLOCK_R=chosen["block_r"], BLOCK_W=chosen["block_w"],
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def _checked(x: Tensor, packed: Tensor, alpha: Tensor, offset: Tensor | None, group_size: int) -> tuple[int, int]:
    """(N, K), or the error that `lut_gemm` promises."""
    require(x.dim() == 2 and x.shape[0] == 1, f"x must be one row [1, K], got {tuple(x.shape)}")
    require(alpha.dim() == 3 and alpha.numel() > 0, f"alpha must be [N, groups, planes], got {tuple(alpha.shape)}")
    K, (N, groups, planes) = x.shape[1], alpha.shape
    require(
        group_size > 0 and group_size % 32 == 0 and groups * group_size == K,
        f"group_size must be a multiple of 32, and K={K} in {groups} groups of it, got {group_size}",
    )
    shape = (planes, -(-N // 4), K // 32, 4)
    require(tuple(packed.shape) == shape, f"packed must be {shape} for alpha, got {tuple(packed.shape)}")
    held = {"x": x, "packed": packed, "alpha": alpha}
    if offset is not None:
        require(tuple(offset.shape) == (N, groups), f"offset must be {(N, groups)}, got {tuple(offset.shape)}")
        held["offset"] = offset
    require_dtype((torch.int32,), packed=packed)
    require_dtype(FLOATS, **{name: tensor for name, tensor in held.items() if name != "packed"})
    require_contiguous(**held)
    require_launchable(**held)
    return N, K


def dequantize(packed: Tensor, alpha: Tensor, offset: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weights `[N, K]` in dtype by plain torch operators, summed in float32."""
    (N, groups, planes), places = alpha.shape, torch.arange(32, dtype=torch.int32, device=packed.device)
    values = torch.zeros((N, groups, group_size), device=packed.device)
    for plane in range(planes):
        bits = (packed[plane, ..., None] >> places & 1).transpose(1, 2).reshape(-1, groups, group_size)[:N]
        values += alpha[..., plane, None].float() * (2 * bits - 1)
    return (values if offset is None else values + offset.float()[..., None]).flatten(1).to(dtype)


def arguments(N: int, K: int, planes: int, group_size: int, device: torch.device) -> tuple:
    """Those of `lut_gemm`, with contents on a GPU only."""
    packed = torch.empty((planes, -(-N // 4), K // 32, 4), dtype=torch.int32, device=device)
    alpha = torch.empty((N, K // group_size, planes), dtype=torch.bfloat16, device=device)
    x = torch.empty((1, K), dtype=torch.bfloat16, device=device)
    if device.type == "cuda":
        x.normal_()
        packed.random_(-(2**31), 2**31)
        alpha.uniform_(0.005, 0.015)
    return x, packed, alpha, None, group_size


def dense_arguments(x: Tensor, packed: Tensor, alpha: Tensor, offset: Tensor | None, group_size: int) -> tuple:
    """The same weights as cuBLAS wants them: (x, W), both in x's dtype."""
    return x, dequantize(packed, alpha, offset, group_size, x.dtype)


def llama_case(N: int, K: int, planes: int, group_size: int = 128) -> Case:
    """A linear layer of a Llama model for one token, bfloat16 activations and scales."""
    return Case(
        name=f"1 x {K} to {N}, {planes} planes g{group_size}",
        inputs=lambda device: arguments(N, K, planes, group_size, device),
        run=lut_gemm,
        expected=lambda *a: F.linear(*dense_arguments(*a)),
        bytes=planes * N * (K // 8 + 2 * K // group_size) + 2 * (K + N),
        operations=planes * N * K,
        kind="stream",
        peers={"cuBLAS bf16": F.linear},
        prepare={"cuBLAS bf16": dense_arguments},
    )


CASES = [llama_case(N, 4096, planes) for N in (4096, 11008) for planes in (2, 3, 4)] + [llama_case(4096, 11008, 3)]
