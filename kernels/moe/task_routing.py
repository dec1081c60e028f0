"""Expert gather in Triton: the k experts of one task, out of stacked weights, as one dense layer, in one launch.

Fused: choosing the experts, putting them side by side, and multiplying what they contribute by the gate's weights. Up
and gate keep their bits: a chosen expert's rows are one run of memory, and go to one run. Columns of down go beside
those of the other experts, so its rows are moved one by one, times the expert's weight in float32, rounded once.

With k of E experts, F hidden numbers each, e bytes a number, and m = 3 matrices for "swiglu", 2 for "relu":
    bytes        2 m k F dim e + 12 k    the chosen experts in, the dense layer out; nothing of the others
    operations   k F dim, for down: it waits for memory alone
Replaces index_select for each matrix, then for down a conversion, a product, a conversion back and a transposing copy:
down alone crosses the bus some ten times instead of twice, and several launches follow each other.

A program takes ROWS x COLUMNS numbers of one expert: programs along the first axis take up, then gate, as runs, then
down in tiles; the second axis is the choice. Layout: up, gate [E, F, dim] and down [E, dim, F], row-major; the results
[k F, dim] and [dim, k F], too. F and dim may be any number, but 128 bits at a time need multiples of 16.
Method: Kudugunta et al. 2021, arXiv:2110.03742; the layer's identity is in chapters/moe/task_routing.py.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import guard
from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Layer = tuple[Tensor, Tensor, Tensor | None]


@triton.jit
def copy_run(from_ptr, to_ptr, block, size, known, BLOCK: tl.constexpr):
    """Block number `block` of a run of `size` numbers, as they are; NaN where the expert is not known."""
    start = block.to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    live = at < size - start
    value = tl.load(from_ptr + start + at, mask=live, other=0.0)
    tl.store(to_ptr + start + at, tl.where(known, value, float("nan")), mask=live)


@triton.jit
def scale_tile(from_ptr, to_ptr, tile, weight, dim, F, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile number `tile`, by rows, of an expert's down [dim, F] times its weight, to rows that are `pitch` apart.

    The product is float32 and rounded once. Rows beyond dim and columns beyond F are neither read nor written: right
    of an expert's columns stand those of the next one.
    """
    across = tl.cdiv(F, COLUMNS)
    row = tile // across * ROWS + tl.arange(0, ROWS)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < dim)[:, None] & (column < F)[None, :]
    row64 = row.to(tl.int64)[:, None]
    value = tl.load(from_ptr + row64 * F + column[None, :], mask=live, other=0.0)
    scaled = (value.to(tl.float32) * weight).to(value.dtype)
    tl.store(to_ptr + row64 * pitch + column[None, :], scaled, mask=live)


@triton.jit
def gather_kernel(
    up_ptr, gate_ptr, down_ptr, expert_ptr, weight_ptr, up_out_ptr, gate_out_ptr, down_out_ptr,
    experts, dim, F, size, runs, pitch, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: one block of one matrix of one chosen expert; of `size` numbers, F dim, in `runs` blocks.

    The j-th chosen expert goes to rows j F and on of up and gate, and to columns j F and on of down, whose rows are
    `pitch` = k F long. Nothing is read for an expert outside range(experts): its part becomes NaN.
    """
    BLOCK: tl.constexpr = ROWS * COLUMNS
    block, choice = tl.program_id(0), tl.program_id(1)
    expert = tl.load(expert_ptr + choice).to(tl.int64)
    weight = tl.load(weight_ptr + choice)
    known = (expert >= 0) & (expert < experts)
    source = tl.where(known, expert, 0) * size
    target = choice.to(tl.int64) * size
    if block < runs:
        copy_run(up_ptr + source, up_out_ptr + target, block, size, known, BLOCK)
    elif block < (1 + GATED) * runs:
        copy_run(gate_ptr + source, gate_out_ptr + target, block - runs, size, known, BLOCK)
    else:
        weight = tl.where(known, weight, float("nan"))
        tile = block - (1 + GATED) * runs
        scale_tile(down_ptr + source, down_out_ptr + choice * F, tile, weight, dim, F, pitch, ROWS, COLUMNS)


def gather(
    up: Tensor, down: Tensor, expert: Tensor, weight: Tensor, gate: Tensor | None = None,
    *, rows: int = 16, columns: int = 256,
) -> Layer:  # fmt: skip
    """The chosen experts side by side as one dense layer: up and gate `[k F, dim]` (or None), down `[dim, k F]`.

    up, gate `[experts, F, dim]` and down `[experts, dim, F]`: float32, float16 or bfloat16, all alike, contiguous
    expert    int64 or int32 `[k]`, 1 <= k <= experts; a number outside range(experts) is refused on the CPU; on CUDA,
              where nobody waits to look at it, its part of every result is NaN
    weight    float32 `[k]`; what is not finite spreads to its columns of down
    rows, columns    of a program's tile, powers of two

    Results have the dtype of up. Raises ValueError or TypeError for anything else.
    """
    check(up, down, expert, weight, gate)
    (experts, F, dim), k = up.shape, len(expert)
    require(experts * F * dim < 2**62 and F * dim < 2**31, f"an expert may have 2^31 weights, got {F} x {dim}")
    up_out, down_out = up.new_empty(k * F, dim), up.new_empty(dim, k * F)
    gate_out = None if gate is None else torch.empty_like(up_out)
    runs, tiles = triton.cdiv(F * dim, rows * columns), triton.cdiv(dim, rows) * triton.cdiv(F, columns)
    matrices = 1 if gate is None else 2
    gather_kernel[(matrices * runs + tiles, k)](
        up, up if gate is None else gate, down, expert, weight, up_out, up_out if gate_out is None else gate_out,
        down_out, experts, dim, F, F * dim, runs, k * F, GATED=matrices - 1, ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return up_out, down_out, gate_out


def check(up: Tensor, down: Tensor, expert: Tensor, weight: Tensor, gate: Tensor | None) -> None:
    """Refuse tensors that `gather` cannot serve."""
    stacks = {"up": up, "down": down} | ({} if gate is None else {"gate": gate})
    shapes = {name: tuple(stack.shape) for name, stack in stacks.items()}
    require(
        up.dim() == 3 and up.numel() > 0 and down.shape == up.mT.shape and (gate is None or gate.shape == up.shape),
        f"up and gate must be [experts, F, dim] and down [experts, dim, F], got {shapes}",
    )
    fits = expert.dim() == 1 and weight.shape == expert.shape and 1 <= len(expert) <= len(up)
    given = f"got {tuple(expert.shape)} and {tuple(weight.shape)}"
    require(fits, f"expert and weight must both be [k] with 1 <= k <= {len(up)} experts, {given}")
    require_dtype(DTYPES, up=up)
    require_dtype((up.dtype,), **stacks)
    require_dtype((torch.int64, torch.int32), expert=expert)
    require_dtype((torch.float32,), weight=weight)
    require_contiguous(**stacks, expert=expert, weight=weight)
    require_launchable(**stacks, expert=expert, weight=weight)
    if expert.device.type == "cpu" and not guard.COMPILE_ONLY:
        known = bool(((expert >= 0) & (expert < len(up))).all())
        require(known, f"expert must be from 0 to {len(up) - 1}, got {expert.tolist()}")


def torch_gather(up: Tensor, down: Tensor, expert: Tensor, weight: Tensor, gate: Tensor | None = None) -> Layer:
    """`gather` in plain torch operators, one matrix after the other."""
    scaled = down.index_select(0, expert).float() * weight[:, None, None]
    beside = torch.cat(scaled.to(down.dtype).unbind(0), 1)
    below = None if gate is None else gate.index_select(0, expert).flatten(0, 1)
    return up.index_select(0, expert).flatten(0, 1), beside, below


def case(name: str, k: int, F: int, dim: int, dtype: torch.dtype, gated: bool = True) -> Case:
    """k of 2 k experts: what a call moves does not depend on how many there are."""
    experts, matrices = 2 * k, 3 if gated else 2

    def inputs(device: torch.device) -> tuple:
        up, gate = (torch.empty(experts, F, dim, dtype=dtype, device=device) for _ in range(2))
        down, expert = torch.empty(experts, dim, F, dtype=dtype, device=device), torch.arange(0, experts, 2)
        weight = torch.full((k,), 1 / k, device=device)
        if device.type == "cuda":
            for stack in (up, gate, down):
                stack.normal_()
        return up, down, expert.to(device), weight, gate if gated else None

    return Case(
        name=f"{name}: {k} x {F} x {dim}",
        inputs=inputs,
        run=gather,
        expected=torch_gather,
        bytes=2 * matrices * k * F * dim * dtype.itemsize + 12 * k,
        operations=k * F * dim,
        kind="stream",
        peers={"torch, index_select and cat": torch_gather},
    )


CASES = [
    case("Mixtral", 2, 14336, 4096, torch.bfloat16),
    case("Llama-7B, one expert", 1, 11008, 4096, torch.float16),
    case("Llama-8B's layer in 4", 4, 3584, 4096, torch.bfloat16),
    case("DeepSeek", 6, 1408, 2048, torch.bfloat16),
    case("GShard, relu, float32", 2, 8192, 1024, torch.float32, gated=False),
]
