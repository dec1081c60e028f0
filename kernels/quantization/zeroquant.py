"""Activations to 8-bit codes by token, where they are made: in RMSNorm, with the residual sum, and in SwiGLU or GELU.

A scale by token needs the maximum of a row before its first code. A program holds its row on chip from the only load to
the only store: norm or activation, maximum, division, rounding and the narrowing to a byte take place between them.

    norm          tokens · dim · (b + 1)  +  4 tokens  +  b dim          b bytes of x, one of the code; scale, weight
    with residual tokens · dim · (3 b + 1)  +  …                         reads x and residual, writes their sum, too
    SwiGLU        tokens · hidden · (2 b + 1)  +  4 tokens
    GELU          tokens · hidden · (b + 1)  +  4 tokens
    operations    about ten a value, none of a matrix product: memory is the floor
Replaces the sum, the norm (or the activation), the maximum and the rounding in four kernels, which move 3 b, 2 b, b and
b + 1 bytes a value: 15 in 16 bits, where 7 are the floor.

The norm divides a row by one number, which changes its step and not its codes: x · weight, max and codes need no sum of
squares, and are the same to the bit in whatever order that sum is taken. It only enters the scale.
Rounding is that of the reference: an IEEE division, and ties to even by adding 1.5 · 2^23, where a float counts in ones
(the quotient is clipped first, so that the sum is exact). exp and erf are libdevice's, as in torch, not the faster
approximation: a code at the edge of two would show the difference. All arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from kernels.cases import Case
from kernels.guard import interpreting, require, require_contiguous, require_dtype, require_launchable

ONES = tl.constexpr(1.5 * 2**23)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
INTERPRETED = tl.constexpr(interpreting())
LARGEST = 16384  # values of a row that fits on chip: of twice as many the registers spill
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def exp(x):
    """e^x; the interpreter has no libdevice."""
    if INTERPRETED:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def row_codes(x):
    """A row of float32 as codes (int8), and their step."""
    step = tl.max(tl.abs(x), axis=0) / 128
    step = tl.where(step < TINY, 1.0, step)
    quotient = tl.minimum(tl.maximum(tl.div_rn(x, step), -128.0), 127.0)
    return ((quotient + ONES) - ONES).to(tl.int8), step


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, residual_ptr, codes_ptr, scale_ptr, hidden_ptr, dim, eps,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row. RESIDUAL: the row is x + residual, rounded to their dtype, and written to hidden."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < dim
    x = tl.load(x_ptr + row * dim + column, mask=live, other=0.0)
    if RESIDUAL:
        other = tl.load(residual_ptr + row * dim + column, mask=live, other=0.0)
        x = (x.to(tl.float32) + other.to(tl.float32)).to(x.dtype)
        tl.store(hidden_ptr + row * dim + column, x, mask=live)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=live, other=0.0).to(tl.float32)
    codes, step = row_codes(x * weight)
    tl.store(codes_ptr + row * dim + column, codes, mask=live)
    mean = tl.sum(x * x, axis=0) / dim
    scale = step / tl.sqrt(mean + eps)
    tl.store(scale_ptr + row, scale + mean * 0.0)  # NaN if the sum is not finite, which a maximum does not show


@triton.jit
def activation_kernel(x_ptr, up_ptr, codes_ptr, scale_ptr, hidden, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: silu(x) · up if GATED, gelu(x) otherwise."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < hidden
    x = tl.load(x_ptr + row * hidden + column, mask=live, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(up_ptr + row * hidden + column, mask=live, other=0.0).to(tl.float32)
        y = tl.div_rn(x, 1 + exp(-x)) * up
    else:
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    codes, step = row_codes(y)
    tl.store(codes_ptr + row * hidden + column, codes, mask=live)
    tl.store(scale_ptr + row, step + tl.sum(y * 0.0, axis=0))  # NaN if a value is not finite


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 `[tokens, dim]`, scale float32 `[tokens]` and hidden: x + residual, or x itself.

    x, residual  float16, bfloat16 or float32 `[tokens, dim]`, contiguous, of one dtype; dim at most 16,384
    weight       `[dim]`, of that dtype
    eps          above 0

    A kernel cannot stop at a number that is not finite: the scale of its token is then NaN.
    Raises ValueError or TypeError for anything else.
    """
    inputs = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    _check(inputs)
    require(weight.shape == x.shape[1:], f"weight must be [{x.shape[1]}] as x has columns, got {tuple(weight.shape)}")
    require(residual is None or residual.shape == x.shape, f"residual must have the shape of x, {tuple(x.shape)}")
    require(eps > 0, f"eps must be above 0, got {eps}")
    codes, scale = _results(x)
    hidden = x if residual is None else torch.empty_like(x)
    if len(x):
        args = x, weight, x if residual is None else residual, codes, scale, hidden, x.shape[1], eps
        rms_norm_kernel[(len(x),)](*args, RESIDUAL=residual is not None, **configuration(x.shape[1]))
    return codes, scale, hidden


def swiglu_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[tokens, hidden]` and scale float32 `[tokens]` of silu(gate) · up.

    gate, up as x of `rms_norm_quantize`, of one shape. The scale of a token that is not finite is NaN.
    Raises ValueError or TypeError for anything else.
    """
    _check({"gate": gate, "up": up})
    require(gate.shape == up.shape, f"gate and up must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    codes, scale = _results(gate)
    if len(gate):
        meta = {"GATED": True, **configuration(gate.shape[1])}
        activation_kernel[(len(gate),)](gate, up, codes, scale, gate.shape[1], **meta)
    return codes, scale


def gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of gelu(x) = x / 2 · (1 + erf(x / √2))."""
    _check({"x": x})
    codes, scale = _results(x)
    if len(x):
        meta = {"GATED": False, **configuration(x.shape[1])}
        activation_kernel[(len(x),)](x, x, codes, scale, x.shape[1], **meta)
    return codes, scale


def configuration(columns: int) -> dict[str, Any]:
    """A row's tile, and warps for 16 values a thread, as far as there are."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": max(1, min(32, block // 512))}


def _check(inputs: dict[str, Tensor]) -> None:
    """The errors that all wrappers promise; the first of `inputs` is a matrix."""
    name, x = next(iter(inputs.items()))
    require(x.dim() == 2, f"{name} must be [tokens, columns], got shape {tuple(x.shape)}")
    require(0 < x.shape[1] <= LARGEST, f"{name} must have 1 to {LARGEST} columns, got {x.shape[1]}")
    require_dtype(DTYPES, **inputs)
    dtypes = {name: each.dtype for name, each in inputs.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"{', '.join(inputs)} must have one dtype, got {dtypes}")
    require_contiguous(**inputs)
    require_launchable(**inputs)


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for codes and scales."""
    return torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), dtype=torch.float32, device=x.device)


def torch_codes(y: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and steps of the rows of y, float32, by plain torch operators."""
    step = y.abs().amax(1) / 128
    step = torch.where(step < TINY.value, torch.ones_like(step), step)
    return (y / step[:, None]).round().clamp(-128, 127).to(torch.int8), step


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple:
    """`rms_norm_quantize` by plain torch operators."""
    hidden = x if residual is None else x + residual
    precise = hidden.float()
    codes, step = torch_codes(precise * weight.float())
    return codes, step * (precise.square().mean(1) + eps).rsqrt(), hidden


def torch_swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_quantize` by plain torch operators."""
    return torch_codes(F.silu(gate.float()) * up.float())


def torch_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu_quantize` by plain torch operators."""
    return torch_codes(x.float() * 0.5 * (1 + torch.erf(x.float() * 0.7071067811865476)))


def rows(tokens: int, columns: int, count: int, device: torch.device) -> tuple[Tensor, ...]:
    """`count` bfloat16 matrices, with contents on a GPU only."""
    made = [torch.empty(tokens, columns, dtype=torch.bfloat16, device=device) for _ in range(count)]
    return tuple(x.normal_() if device.type == "cuda" else x for x in made)


def norm_case(tokens: int, dim: int, residual: bool) -> Case:
    """The norm before a Llama layer, on bfloat16."""

    def inputs(device: torch.device) -> tuple:
        x, *others = rows(tokens, dim, 1 + residual, device)
        return x, rows(1, dim, 1, device)[0][0], 1e-5, *others

    return Case(
        name=f"norm{' with residual' * residual} {tokens} x {dim}",
        inputs=inputs,
        run=rms_norm_quantize,
        expected=torch_rms_norm,
        bytes=tokens * dim * (7 if residual else 3) + 4 * tokens + 2 * dim,
        operations=0,
        kind="stream",
        peers={"torch": torch_rms_norm},
    )


def activation_case(tokens: int, hidden: int, gated: bool) -> Case:
    """The middle of a feed-forward layer, on bfloat16."""
    peer = torch_swiglu if gated else torch_gelu
    return Case(
        name=f"{'SwiGLU' if gated else 'GELU'} {tokens} x {hidden}",
        inputs=lambda device: rows(tokens, hidden, 1 + gated, device),
        run=swiglu_quantize if gated else gelu_quantize,
        expected=peer,
        bytes=tokens * hidden * (5 if gated else 3) + 4 * tokens,
        operations=0,
        kind="stream",
        peers={"torch": peer},
    )


CASES = [
    *(norm_case(tokens, 4096, residual) for tokens in (16, 4096) for residual in (False, True)),
    *(activation_case(4096, hidden, True) for hidden in (11008, 14336)),
    activation_case(4096, 16384, False),
]
