"""SR-STE in Triton: the N largest of every M are found in registers, so no mask is ever stored or read.

Training an N:M model needs a mask three times a step: to multiply by the kept weights, to decay the dropped ones, and,
after the update, for the next forward pass. Each kernel here finds it from the weights that it reads anyway:

    sparse_weight      sparse = E ⊙ W                              reads W, writes sparse
    refined_gradient   G' = G + λ (1 − E) ⊙ W                      reads W and G, writes G'
    refined_step       W' = W − γ G',  sparse = E' ⊙ W'            reads W and G, writes W' and sparse
                       E from W, E' from W' as it is stored: two selections, and nothing between them leaves the chip

With w bytes for a weight and g for a gradient and a sparse weight, K weights:
    bytes        refined_step  K (2 w + 2 g), the floor: 8 K in bfloat16, 12 K with float32 weights
                 the others    K (w + g) and K (2 w + g)
    operations   a weight meets the M − 1 others of its group: two instructions for each, twice in refined_step. In all
                 38 a weight at 2:4, 56 at 4:8, 112 at 8:16 (triton 3.7.1, sm_90, bfloat16; counted, not timed). An H200
                 issues about 49 in the time in which it moves 8 bytes: so 2:4 waits for memory, and 8:16 does not
    naive        torch writes |W|, sorts (values, and 8 bytes an index), scatters zeros into a copy, subtracts it from
                 W, times λ, plus G, times γ, from W; the next mask: 25 + 16 + 10 + 25 = 76 K bytes in bfloat16

`kept` ranks instead of sorting. Every member of a group meets the others by swaps: halves of the group trade places, a
bit of the position at a time, and in the order of Gray's code M − 1 swaps bring it together with all M − 1. Up to
M = 8, in 16 bits, a group lies in one thread, and a swap is a choice of registers; beyond it goes between threads.
A float's bits without the sign order as its magnitude does. Of equal ones the later wins, as in the released code: in
whole numbers "at least" is "greater than one less", so that one subtraction decides, ties and all.

A group never crosses a row (M divides the columns), so a weight is one run of numbers, and a program takes BLOCK of
them. Arithmetic is in float32, rounded once. A NaN ranks above infinity: it is kept, and stays visible.
Method: Zhou et al. 2021, arXiv 2102.04010, as chapters/sparsity/sr_ste.py has it.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = (1, 2, 4, 8, 16, 32)  # what M may be


@triton.jit
def magnitude_bits(weight):
    """Integers, int32, that order as the magnitudes of floats; all of up to 32 bits are exact in float32."""
    return weight.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def swapped(tile, M: tl.constexpr, d: tl.constexpr):
    """The members of each group [R, M] in the order position XOR d, for d a power of two below M: int32 [R, M]."""
    halves = tl.reshape(tile, (tile.shape[0] * (M // (2 * d)), 2, d))
    other = halves ^ tl.xor_sum(halves, axis=1, keep_dims=True)
    return tl.reshape(other, (tile.shape[0], M))


@triton.jit
def kept(key, N: tl.constexpr, M: tl.constexpr):
    """Which of the M members of each group are among its N largest: keys int32 [R, M] -> bool [R, M].

    M is a power of two, 1 <= N <= M; keys are not negative. Of equal keys the one of the highest position is kept. So
    each group keeps exactly N, also where all are equal. Works for any R, also of groups that are not all in use.
    """
    place = tl.broadcast_to(tl.arange(0, M)[None, :], key.shape)
    rank = tl.zeros(key.shape, tl.int32)
    other = key
    for turn in tl.static_range(1, M):  # distances in the order of Gray's code: one bit changes, one swap is enough
        other = swapped(other, M, turn & -turn)
        later = ((place ^ turn ^ (turn >> 1)) > place).to(tl.int32)
        rank -= (key - other - later) >> 31  # -1 where other > key, or where it is equal and later
    return rank < N


@triton.jit
def chosen(weight, N: tl.constexpr, M: tl.constexpr):
    """`kept` of a run of floats [BLOCK], M of which make a group."""
    key = tl.reshape(magnitude_bits(weight), (weight.shape[0] // M, M))
    return tl.reshape(kept(key, N, M), weight.shape)


@triton.jit
def sparse_kernel(weight, sparse, count, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK weights, of `count` in all: those that stay, and zeros."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offsets < count
    w = tl.load(weight + offsets, mask=live, other=0.0)
    tl.store(sparse + offsets, tl.where(chosen(w, N, M), w, 0.0), mask=live)


@triton.jit
def gradient_kernel(
    weight, gradient, refined, count, decay, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The refined gradient of BLOCK weights, of `count` in all."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offsets < count
    w = tl.load(weight + offsets, mask=live, other=0.0)
    g = tl.load(gradient + offsets, mask=live, other=0.0).to(tl.float32)
    dropped = tl.where(chosen(w, N, M), 0.0, w.to(tl.float32))
    tl.store(refined + offsets, (g + decay * dropped).to(w.dtype), mask=live)


@triton.jit
def step_kernel(
    weight, gradient, moved, sparse, count, rate, decay, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One SGD step of BLOCK weights, of `count` in all, and what stays of them for the next forward pass.

    weight, moved [count] in one dtype, gradient, sparse [count] in one; moved may be weight, sparse may be gradient.
    With w, g in float32: moved = w − rate · (g + decay · w where w is dropped), rounded once; sparse is moved as it is
    stored, where THAT is kept, else +0. A kept weight gets no decay.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offsets < count
    w = tl.load(weight + offsets, mask=live, other=0.0)
    g = tl.load(gradient + offsets, mask=live, other=0.0).to(tl.float32)
    dropped = tl.where(chosen(w, N, M), 0.0, w.to(tl.float32))
    new = (w.to(tl.float32) - rate * (g + decay * dropped)).to(w.dtype)
    tl.store(moved + offsets, new, mask=live)
    stays = tl.where(chosen(new, N, M), new.to(tl.float32), 0.0)
    tl.store(sparse + offsets, stays.to(sparse.dtype.element_ty), mask=live)


def checked(weight: Tensor, n: int, m: int, **others: Tensor) -> None:
    """ValueError or TypeError unless the weight has n:m groups and the others are like it."""
    require(weight.dim() == 2, f"weight must be [out, in], got shape {tuple(weight.shape)}")
    require(m in GROUPS, f"m must be one of {', '.join(map(str, GROUPS))}, got {m}")
    require(1 <= n <= m, f"need 1 <= n <= m, got n={n}, m={m}")
    require(weight.shape[1] % m == 0, f"weight has {weight.shape[1]} columns, not divisible by m={m}")
    for name, other in others.items():
        require(other.shape == weight.shape, f"{name} must be [{', '.join(map(str, weight.shape))}] as weight is, "
                f"got {tuple(other.shape)}")  # fmt: skip
    require_dtype(DTYPES, weight=weight, **others)
    require_contiguous(weight=weight, **others)
    require_launchable(weight=weight, **others)


def checked_factors(**factors: float) -> None:
    """ValueError for the first that is negative or not finite."""
    for name, value in factors.items():
        require(0 <= value < math.inf, f"{name} must be finite and not negative, got {value}")


def constants(n: int, m: int, block: int | None) -> dict[str, int]:
    """Launch constants; `block` numbers of a program, a power of two, instead of eight for each of its threads."""
    return {"N": n, "M": m, "BLOCK": block or 1024, "num_warps": 4}


def sparse_weight(weight: Tensor, n: int = 2, m: int = 4, block: int | None = None) -> Tensor:
    """The n largest magnitudes of every m neighbours of weight [out, in]; +0 for the rest. Of equals the later stays.

    float16, bfloat16 or float32, contiguous; m is a power of two up to 32 and divides in. `block` numbers make one
    program. Raises ValueError and TypeError for what is not so.
    """
    checked(weight, n, m)
    sparse = torch.empty_like(weight)
    tile = constants(n, m, block)
    if weight.numel():
        sparse_kernel[(triton.cdiv(weight.numel(), tile["BLOCK"]),)](weight, sparse, weight.numel(), **tile)
    return sparse


def refined_gradient(
    weight: Tensor, gradient: Tensor, n: int = 2, m: int = 4, decay: float = 2e-4, block: int | None = None
) -> Tensor:
    """gradient + decay · weight where the weight is dropped, [out, in] in the dtype of weight.

    The two may differ in dtype. Arguments and errors as `sparse_weight`; decay is finite and not negative.
    """
    checked(weight, n, m, gradient=gradient)
    checked_factors(decay=decay)
    refined = torch.empty_like(weight)
    tile = constants(n, m, block)
    if weight.numel():
        grid = (triton.cdiv(weight.numel(), tile["BLOCK"]),)
        gradient_kernel[grid](weight, gradient, refined, weight.numel(), float(decay), **tile)
    return refined


def refined_step(
    weight: Tensor, gradient: Tensor, n: int = 2, m: int = 4, rate: float = 0.1, decay: float = 2e-4,
    block: int | None = None, in_place: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One SGD step by the refined gradient: (the new weight, its sparse part in the dtype of gradient).

    in_place   the new weight is written into weight, the sparse one into gradient: no memory but what training holds
    Arguments and errors as `refined_gradient`, for the rate as for the decay.
    """
    checked(weight, n, m, gradient=gradient)
    checked_factors(rate=rate, decay=decay)
    moved, sparse = (weight, gradient) if in_place else (torch.empty_like(weight), torch.empty_like(gradient))
    tile = constants(n, m, block)
    if weight.numel():
        grid = (triton.cdiv(weight.numel(), tile["BLOCK"]),)
        step_kernel[grid](weight, gradient, moved, sparse, weight.numel(), float(rate), float(decay), **tile)
    return moved, sparse


def torch_sparse(weight: Tensor, n: int, m: int) -> Tensor:
    """`sparse_weight` by torch's stable sort, whose first m − n go."""
    groups = weight.unflatten(1, (-1, m))
    order = groups.abs().argsort(dim=-1, stable=True)[..., : m - n]
    return groups.scatter(-1, order, 0).flatten(1)


def torch_gradient(weight: Tensor, gradient: Tensor, n: int, m: int, decay: float) -> Tensor:
    """`refined_gradient` by plain torch operators."""
    return gradient + decay * (weight - torch_sparse(weight, n, m))


def torch_step(
    weight: Tensor, gradient: Tensor, n: int, m: int, rate: float, decay: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`refined_step` by plain torch operators, one after the other."""
    wide = weight.float()
    moved = (wide - rate * torch_gradient(wide, gradient.float(), n, m, decay)).to(weight.dtype)
    return moved, torch_sparse(moved, n, m).to(gradient.dtype)


def drawn(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """A weight, and a gradient in bfloat16; `check` only compiles and needs no contents."""
    pair = [torch.empty(rows, columns, dtype=each, device=device) for each in (dtype, torch.bfloat16)]
    weight, gradient = (each.normal_(std=0.02) if device.type == "cuda" else each for each in pair)
    return weight, gradient


def step_case(rows: int, columns: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """An update of a Llama weight; gradient and sparse weight in bfloat16."""
    return Case(
        name=f"step {n}:{m} N={rows} K={columns} {'fp32 weight' if dtype.itemsize == 4 else 'bf16'}",
        inputs=lambda device: (*drawn(rows, columns, device, dtype), n, m, 0.1, 2e-4),
        run=refined_step,
        expected=torch_step,
        bytes=(2 * dtype.itemsize + 4) * rows * columns,
        operations=0,
        kind="stream",
        peers={"torch": torch_step},
    )


CASES = [
    step_case(4096, 4096, 2, 4),
    step_case(4096, 11008, 2, 4, torch.float32),
    step_case(4096, 11008, 4, 8),
    Case(
        name="sparse 2:4 N=4096 K=11008",
        inputs=lambda device: (drawn(4096, 11008, device)[0], 2, 4),
        run=sparse_weight,
        expected=torch_sparse,
        bytes=4 * 4096 * 11008,
        operations=0,
        kind="stream",
        peers={"torch": torch_sparse},
    ),
    Case(
        name="gradient 2:4 N=4096 K=11008",
        inputs=lambda device: (*drawn(4096, 11008, device), 2, 4, 2e-4),
        run=refined_gradient,
        expected=torch_gradient,
        bytes=6 * 4096 * 11008,
        operations=0,
        kind="stream",
        peers={"torch": torch_gradient},
    ),
]
