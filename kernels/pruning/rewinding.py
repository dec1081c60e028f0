"""The masked step of AdamW in Triton: gradient masked, moments, weight and mask applied, in one pass.

`masked_adamw`, n numbers: weight and gradient of s bytes each, moments in float32, and a mask of a bit or a byte each:
    bytes        3 s n + 16 n + n / 8   weight, gradient, both moments and the mask in; weight and both moments out.
                 The floor: all is read once, all that changes is written once. With a bool mask n, not n / 8.
    operations   about twenty a number, two of them IEEE divisions and one a root: below the time of the bytes
In float32 these are 28.1 bytes a number. torch's fused AdamW moves 28, and does not know the mask: to mask the gradient
before it (read, mask, write) and the weight after it costs 9 more each, 46 together. Where AdamW goes operator by
operator, it moves 80 itself.
The mask's bits are those of a bitmap of the whole tensor, so that the mask is 0.4% of the traffic and not 3%. The tile
has eight neighbours a row, which share a byte of the mask, and every other operand is loaded 128 bits at a time.
Dropped numbers are loaded, too: where zeros stand anywhere, a sector of 32 bytes that holds none that is kept is rare
(one in six at 80%), and a load that is predicated number by number is not a load of 128 bits.
What is dropped is chosen, not multiplied by 0: a NaN in its gradient, or what was in its moments, is gone.

Method: as chapters/pruning/rewinding.py. AdamW: Loshchilov and Hutter 2017, arXiv:1711.05101, in the order of torch.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (it takes a @triton.jit function for the Python function beneath)
from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw

from kernels.cases import Case
from kernels.guard import require, require_contiguous, require_dtype, require_launchable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 2048  # numbers of a program
Step = tuple[Tensor, Tensor, Tensor]


@triton.jit
def adamw_kernel(
    weight, gradient, mask, mean, square, new_weight, new_mean, new_square, n,
    shrink, beta1, rest1, beta2, rest2, rate, root, eps, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers, of n in all, as BLOCK / 8 rows of 8: the three results may be the memory of their arguments.

    weight, gradient, new_weight: one dtype, computed on in float32; the moments float32. BITS: mask is uint8 [⌈n / 8⌉],
    of which bit j of byte b is number 8 b + j; otherwise it is [n], a byte each, 0 where a number is dropped.
    shrink is 1 − rate · decay, rest1 and rest2 are 1 − beta1 and 1 − beta2, which would lose digits if they were taken
    here; rate comes divided by 1 − beta1^step, and root is √(1 − beta2^step):

        mean = beta1 mean + rest1 g;  square = beta2 square + rest2 g²
        weight = shrink weight − rate · mean / (√square / root + eps)

    Where the mask is 0 all three are +0. Neither loads nor stores reach past n, or past the mask's last byte.
    """
    octet = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    lane = tl.arange(0, 8)
    at = octet[:, None] * 8 + lane[None, :]
    live = at < n
    if BITS:
        byte = tl.load(mask + octet, mask=octet * 8 < n, other=0).to(tl.int32)
        keep = (byte[:, None] >> lane[None, :]) & 1 != 0
    else:
        keep = tl.load(mask + at, mask=live, other=0) != 0
    g = tl.where(keep, tl.load(gradient + at, mask=live, other=0.0).to(tl.float32), 0.0)
    m = beta1 * tl.load(mean + at, mask=live, other=0.0) + rest1 * g
    v = beta2 * tl.load(square + at, mask=live, other=0.0) + rest2 * g * g
    w = shrink * tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
    w -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root) + eps)
    tl.store(new_weight + at, tl.where(keep, w, 0.0).to(new_weight.dtype.element_ty), mask=live)
    tl.store(new_mean + at, tl.where(keep, m, 0.0), mask=live)
    tl.store(new_square + at, tl.where(keep, v, 0.0), mask=live)


def masked_adamw(
    weight: Tensor, gradient: Tensor, mask: Tensor, mean: Tensor, square: Tensor, step: int, rate: float,
    betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.0, out: Step | None = None,
    block: int = BLOCK,
) -> Step:  # fmt: skip
    """Step number `step`, from 1, of AdamW for the kept weights: (weight, mean, square) after it.

    weight, gradient  float32, float16 or bfloat16, one shape and dtype, contiguous
    mask              bool of that shape, or its bits as `pack_bits` gives them, uint8 [⌈n / 8⌉]
    mean, square      float32 of that shape: the moments
    out               where the three results go: like weight, mean and square, or these themselves; None: new tensors
    block             numbers of a program, a power of two from 8 on
    A NaN in a kept number's gradient spreads to it, in that of a dropped one it does not.
    Raises ValueError for shapes, layouts, devices and settings that do not fit, TypeError for dtypes.
    """
    require_fit(weight, gradient, mask, mean, square)
    limited = all(0 <= x < math.inf for x in (rate, weight_decay)) and 0 < eps < math.inf
    require(
        step >= 1 and all(0 <= beta < 1 for beta in betas) and limited,
        f"need step >= 1, betas in [0, 1), eps > 0, rate and weight_decay >= 0, got {step=}, {betas=}, {eps=}, "
        f"{rate=}, {weight_decay=}",
    )
    out = out or (torch.empty_like(weight), torch.empty_like(mean), torch.empty_like(square))
    for name, result, like in zip(("weight", "mean", "square"), out, (weight, mean, square), strict=True):
        fits = result.shape == like.shape and result.dtype == like.dtype and result.is_contiguous()
        require(fits, f"out must be like weight, mean and square, contiguous; its {name} is not")
    require_launchable(weight=weight, gradient=gradient, mask=mask, mean=mean, square=square, out=out[0])
    n = weight.numel()
    if n:
        corrected = rate / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)
        how = 1 - rate * weight_decay, betas[0], 1 - betas[0], betas[1], 1 - betas[1], *corrected, eps
        bits = mask if mask.dtype == torch.uint8 else mask.view(torch.uint8)
        sizes = {"BITS": mask.dtype == torch.uint8, "BLOCK": block, "num_warps": max(1, min(8, block // 256))}
        adamw_kernel[(triton.cdiv(n, block),)](weight, gradient, bits, mean, square, *out, n, *how, **sizes)
    return out


def require_fit(weight: Tensor, gradient: Tensor, mask: Tensor, mean: Tensor, square: Tensor) -> None:
    """Raise ValueError or TypeError unless the tensors are as `masked_adamw` says."""
    require_dtype(DTYPES, weight=weight)
    require_dtype((weight.dtype,), gradient=gradient)
    require_dtype((torch.float32,), mean=mean, square=square)
    require_dtype((torch.bool, torch.uint8), mask=mask)
    for name, tensor in (("gradient", gradient), ("mean", mean), ("square", square)):
        require(tensor.shape == weight.shape, f"{name} must be shaped like weight, {tuple(weight.shape)}, got "
                f"{tuple(tensor.shape)}")  # fmt: skip
    octets = (triton.cdiv(weight.numel(), 8),)
    wanted = tuple(weight.shape) if mask.dtype == torch.bool else octets
    require(tuple(mask.shape) == wanted, f"mask must be bool {tuple(weight.shape)} or uint8 {octets}, got {mask.dtype} "
            f"{tuple(mask.shape)}")  # fmt: skip
    require_contiguous(weight=weight, gradient=gradient, mask=mask, mean=mean, square=square)


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask of n numbers, any shape, as uint8 [⌈n / 8⌉]: bit j of byte b is number 8 b + j; the last are 0."""
    require_dtype((torch.bool,), mask=mask)
    flat = torch.nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    places = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat * places).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The bool mask of that shape whose `pack_bits` are given."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> places & 1).bool().flatten()[: shape.numel()].view(shape)


STEP, BETAS, EPS = 10, (0.9, 0.95), 1e-8
SETTINGS = {"lr": 1e-3, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": 0.1}


def step_of_case(weight: Tensor, gradient: Tensor, mask: Tensor, mean: Tensor, square: Tensor) -> Step:
    """The kernel with the settings of the cases, into new tensors: a call that is repeated starts from the same."""
    how = (STEP, SETTINGS["lr"], BETAS, EPS, SETTINGS["weight_decay"])
    return masked_adamw(weight, gradient, mask, mean, square, *how)


def copies(weight: Tensor, gradient: Tensor, mask: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, ...]:
    """What torch's AdamW may write, and where a number is dropped, which `masked_fill` wants to know: bool."""
    mask = mask if mask.dtype == torch.bool else unpack_bits(mask, weight.shape)
    return weight.clone(), gradient, ~mask, mean.clone(), square.clone()


def by_torch(
    weight: Tensor, gradient: Tensor, dropped: Tensor, mean: Tensor, square: Tensor, fused: bool = False,
    foreach: bool = False,
) -> Step:  # fmt: skip
    """The step in place by torch: the gradient masked, AdamW, the weight masked. Moments are 0 where they were 0."""
    kept = gradient.masked_fill(dropped, 0).to(mean.dtype)
    wide = weight.to(mean.dtype)
    steps = [torch.full((), STEP - 1.0, device=weight.device if fused else "cpu")]
    how = {"amsgrad": False, "maximize": False, "fused": fused, "foreach": foreach, **SETTINGS}
    adamw([wide], [kept], [mean], [square], [], steps, **how)
    return weight.copy_(wide).masked_fill_(dropped, 0), mean, square


def expected(weight: Tensor, gradient: Tensor, mask: Tensor, mean: Tensor, square: Tensor) -> Step:
    """The step by torch's AdamW, one operator after the other, on copies."""
    return by_torch(*copies(weight, gradient, mask, mean, square))


def operands(rows: int, columns: int, bits: bool, device: torch.device) -> tuple[Tensor, ...]:
    """A float32 weight, 80% of it dropped, with gradient and moments; `check` only compiles and needs no contents."""
    made = [torch.empty(rows, columns, device=device) for _ in range(4)]
    mask = torch.empty(rows, columns, dtype=torch.bool, device=device)
    if device.type != "cuda":
        return made[0], made[1], mask.new_empty(rows * columns // 8, dtype=torch.uint8) if bits else mask, *made[2:]
    mask = torch.rand(rows, columns, device=device) < 0.2
    weight, gradient, mean, square = (x.normal_(std=std) for x, std in zip(made, (0.02, 1e-3, 1e-4, 1e-3), strict=True))
    kept = [x.masked_fill_(~mask, 0) for x in (weight, mean, square.square_())]
    return kept[0], gradient, pack_bits(mask) if bits else mask, *kept[1:]


def case(rows: int, columns: int, bits: bool = True) -> Case:
    """One step of a Llama weight, the mask in bits or in bytes."""
    n = rows * columns
    peers = {"fused AdamW, two masks": partial(by_torch, fused=True),
             "foreach AdamW, two masks": partial(by_torch, foreach=True)}  # fmt: skip
    return Case(
        name=f"{'bits' if bits else 'bool'} N={rows} K={columns}",
        inputs=partial(operands, rows, columns, bits),
        run=step_of_case,
        expected=expected,
        bytes=28 * n + (n // 8 if bits else n),
        operations=0,
        kind="stream",
        tolerance=1e-5,
        peers=peers,
        prepare=dict.fromkeys(peers, copies),
    )


CASES = [case(4096, 4096), case(4096, 4096, bits=False), case(4096, 11008), case(4096, 14336)]
