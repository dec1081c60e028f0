"""ZeroQuant: weights in groups, activations by token, then each layer taught, alone, by the layer that it replaces.

    weights        scale = 2 max|w| / 2^bits over a group of neighbours,      code = clip(rint(w / scale))
    activations    the same with 8 bits over a token, found as the token comes: nothing is calibrated
    distillation   for each layer l:    min ‖ student_l(h_l) − h_{l+1} ‖²,    where every h is the teacher's

Layer-wise knowledge distillation (LKD) needs no labels and no pass through the whole model: a layer is fed what the
teacher's layer was fed, and its rounded weights learn to answer the same. Memory holds the gradients of one layer.

Saves    bytes: bits + 16 / n per weight, n the size of a group, and 8 bits for an activation.
Costs    the maximum of every token wherever activations are rounded: no trip to memory if it is fused with the norm,
         the SwiGLU or the GELU that makes them. LKD: steps passes, forward and backward, through each layer.
Paper    Yao et al. 2022, arXiv:2206.01861, sections 4.1 to 4.3.
Follows  DeepSpeed, compression/utils.py: groups cut the flattened tensor; max|w| falls on the code 2^(bits−1), which
         does not exist, and is clipped by a step; gradients pass as if nothing were rounded or clipped. LKD as in
         DeepSpeedExamples; there the teacher runs as a whole for every batch, here its layer runs once on all of them:
         the numbers are the same. There a group without a range becomes NaN; here it keeps its value.
Symbols  x `[tokens, dim]`; codes like x; scale, zero `[groups]`, for activations `[tokens]`; h `[batch, T, dim]`.
Kernel   kernels/quantization/zeroquant.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from math import erf

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parametrize

from chapters.claims import Claim
from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from minitfm import surgery
from minitfm.model import Attention, FeedForward, RMSNorm, Transformer

Layers = Sequence[nn.Module]
RATE, BATCH, GROUP = 1e-4, 4, 64  # of the distillation, and weights that share a scale


def checked(x: np.ndarray, name: str = "x") -> np.ndarray:
    """x in float32, or float64 where that loses digits; ValueError if it is empty or not finite."""
    x = np.asarray(x, dtype=np.result_type(x, np.float32))
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite and not empty, got shape {x.shape}")
    return x


def usable(scale: np.ndarray) -> np.ndarray:
    """scale, but 1 where it is below the least normal number."""
    return np.where(scale < np.finfo(scale.dtype).tiny, scale.dtype.type(1), scale)


def quantize(
    x: np.ndarray, bits: int, groups: int = 1, symmetric: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes in the shape of x, and scale, zero `[groups]`: value = code · scale + zero.

    x of any shape, flattened row by row, is cut into `groups` runs of equal length. h = 2**(bits − 1).
    Symmetric: scale = max|x| / h, zero = 0, code = rint(x / scale), clipped to −h .. h − 1; int8.
    Asymmetric: scale = (max − min) / 2**bits, zero = rint(min / scale) · scale, code = rint((x − zero) / scale),
    clipped to 0 .. 2**bits − 1; uint8. rint takes ties to the even number.
    A scale below the least normal number becomes 1; asymmetric, zero is then min: equal numbers keep their value.
    Computed in the dtype of x, at least float32, which scale and zero have. Raises ValueError for x that is empty or
    not finite or whose range overflows, bits outside 2 .. 8, and groups that do not divide the size of x.
    Source: SymQuantizer, AsymQuantizer.
    """
    x = checked(x)
    if bits not in range(2, 9):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    if groups < 1 or x.size % groups:
        raise ValueError(f"groups must divide the {x.size} numbers of x, got {groups}")
    cut, half = x.reshape(groups, -1), 2 ** (bits - 1)
    if symmetric:
        scale = usable(np.abs(cut).max(axis=1) / half)
        codes = np.clip(np.rint(cut / scale[:, None]), -half, half - 1).astype(np.int8)
        return codes.reshape(x.shape), scale, np.zeros_like(scale)
    low, high = cut.min(axis=1), cut.max(axis=1)
    with np.errstate(over="ignore"):
        step = checked((high - low) / (2 * half), "the range of x")
        scale = usable(step)
        zero = np.where(scale == step, np.rint(low / scale) * scale, low)
        codes = np.clip(np.rint((cut - zero[:, None]) / scale[:, None]), 0, 2 * half - 1).astype(np.uint8)
    return codes.reshape(x.shape), scale, zero


def dequantize(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """code · scale + zero, in the dtype of scale and the shape of codes; scale and zero `[groups]` as `quantize`."""
    cut = codes.reshape(len(scale), -1).astype(scale.dtype)
    return (cut * scale[:, None] + zero[:, None]).reshape(codes.shape)


def token_codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 8-bit codes int8 of x `[tokens, dim]` and the scale of each token `[tokens]`."""
    if x.ndim != 2:
        raise ValueError(f"x must be [tokens, dim], got shape {x.shape}")
    scale = usable(np.abs(checked(x)).max(axis=1) / 128)
    return np.clip(np.rint(x / scale[:, None]), -128, 127).astype(np.int8), scale


def rms_norm_quantize(
    x: np.ndarray, weight: np.ndarray, eps: float, residual: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RMSNorm, then 8-bit codes by token: (codes int8 `[tokens, dim]`, scale `[tokens]`, hidden `[tokens, dim]`).

    hidden is x + residual, in the dtype of x, or x itself; codes · scale stand for hidden · weight / rms, where
    rms = sqrt(mean(hidden²) + eps). The norm divides a token by one number: that moves the step and leaves the codes
    alone. They are those of g = hidden · weight: step = max|g| / 128, code = rint(g / step), ties to even, clipped to
    −128 .. 127; scale = step / rms. A step below the least normal number counts as 1. In the precision of x, at least
    float32. x `[tokens, dim]`, weight `[dim]`. ValueError for other shapes, eps not above 0, empty or not finite x.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"x must be [tokens, dim], residual like it, weight [dim]; got {x.shape}, {weight.shape}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    hidden = x if residual is None else (x + residual).astype(x.dtype)
    precise = checked(hidden)
    with np.errstate(over="ignore"):  # what overflows is refused
        codes, step = token_codes(precise * weight.astype(precise.dtype))
        mean = checked((precise**2).mean(axis=1), "the mean square of x")
    rms = np.sqrt(mean + precise.dtype.type(eps))
    return codes, step / rms, hidden


def swiglu_quantize(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-bit codes by token of silu(gate) · up, both `[tokens, hidden]`: (codes int8, scale `[tokens]`).

    silu(g) = g / (1 + exp(−g)); scale = max|·| / 128 and codes as those of `quantize` with a group for each token, all
    in the precision of gate, at least float32. Raises ValueError for other shapes and what is empty or not finite.
    """
    gate, up = checked(gate, "gate"), checked(up, "up")
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have one shape, got {gate.shape} and {up.shape}")
    with np.errstate(over="ignore"):  # exp(−g) may be infinite, silu(g) is then 0
        return token_codes(gate / (1 + np.exp(-gate)) * up)


def gelu_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of gelu(x) = x / 2 · (1 + erf(x / √2)), x `[tokens, hidden]`; errors as `swiglu_quantize`."""
    x = checked(x)
    half, root = x.dtype.type(0.5), x.dtype.type(0.5**0.5)
    return token_codes(x * half * (1 + np.vectorize(erf, [x.dtype])(x * root)))


def rounded(x: Tensor, bits: int = 8, groups: int | None = None) -> Tensor:
    """x `[…, dim]` on the symmetric grids of `quantize`, one for each token, or `groups`; the gradient is that of x."""
    size, half = x.numel() // groups if groups else x.shape[-1], 2 ** (bits - 1)
    cut = x.detach().to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, size)
    scale = cut.abs().amax(dim=1, keepdim=True) / half
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
    values = (cut / scale).round().clamp(-half, half - 1) * scale
    return values.view(x.shape).to(x.dtype) + (x - x.detach())  # + 0, which carries the gradient


class GroupRounding(nn.Module):
    """What a parametrized weight is computed by: its rounded values."""

    def __init__(self, bits: int, groups: int) -> None:
        super().__init__()
        self.bits, self.groups = bits, groups

    def forward(self, weight: Tensor) -> Tensor:
        return rounded(weight, self.bits, self.groups)


def round_input(_layer: nn.Module, args: tuple[Tensor]) -> Tensor:
    """A forward pre-hook: the layer sees its input in 8 bits by token."""
    return rounded(args[0])


class RoundedNorm(RMSNorm):
    """An RMSNorm whose result is rounded, once for all layers that read it; without gradients the kernel does both."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__(norm.weight.numel(), norm.eps)
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and not torch.is_grad_enabled():
            from kernels.quantization.zeroquant import rms_norm_quantize as kernel

            codes, scale, _ = kernel(x.reshape(-1, x.shape[-1]).contiguous(), self.weight, self.eps)
            return (codes * scale[:, None]).to(x.dtype).view_as(x)
        return rounded(super().forward(x))


class RoundedFeedForward(FeedForward):
    """A SwiGLU feed-forward layer whose hidden values are rounded; without gradients the kernel does both."""

    def __init__(self, layer: FeedForward) -> None:
        nn.Module.__init__(self)  # it takes the parts of `layer`, and makes none
        self.gate_proj, self.up_proj, self.down_proj = layer.gate_proj, layer.up_proj, layer.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if x.is_cuda and not torch.is_grad_enabled():
            from kernels.quantization.zeroquant import swiglu_quantize as kernel

            codes, scale = kernel(gate.flatten(0, -2), up.flatten(0, -2))
            return self.down_proj((codes * scale[:, None]).to(x.dtype).view_as(up))
        return self.down_proj(rounded(F.silu(gate) * up))


def quantize_model(model: Transformer, bits: int, group_size: int = 64) -> None:
    """Round what the blocks multiply, in place: weights as they are used, so that they can be trained, and inputs.

    ValueError for bits outside 2 .. 8, and for a group_size that does not divide every weight matrix.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    if any(group_size < 1 or layer.weight.numel() % group_size for layer in surgery.linears(model).values()):
        raise ValueError(f"group_size must divide the weights of every layer, got {group_size}")
    for name, part in list(model.named_modules()):
        if isinstance(part, RMSNorm) and name.startswith("blocks."):
            surgery.replace(model, name, RoundedNorm(part))
        elif isinstance(part, Attention):
            part.o_proj.register_forward_pre_hook(round_input)
        elif isinstance(part, FeedForward) and part.gated:
            surgery.replace(model, name, RoundedFeedForward(part))
        elif isinstance(part, FeedForward):
            part.down_proj.register_forward_pre_hook(round_input)
    for layer in surgery.linears(model).values():
        rounding = GroupRounding(bits, layer.weight.numel() // group_size)
        parametrize.register_parametrization(layer, "weight", rounding)


def fresh_optimizer(layer: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW for the parameters of a layer; matrices decay by 0.01, biases and gains of norms do not."""
    matrices, rest = ([p for p in layer.parameters() if (p.dim() > 1) == many] for many in (True, False))
    groups = {"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)


def distill_layers(
    student: Layers, teacher: Layers, batches: Sequence[Tensor], steps: int, rate: float, *rest: Tensor | None
) -> np.ndarray:
    """LKD: train each layer of the student, in place, to answer as the teacher's; the losses `[layers, steps]`.

    layer(x, *rest) maps `[…, dim]` to `[…, dim]`; batches are the x of the first layer. Layer l is fed what the
    teacher's layer l is fed, never what the student makes of it; its target is what the teacher's layer answers, its
    loss the mean square of the difference, its optimizer a new one by `fresh_optimizer`. Step i, from 0, takes batch
    i mod len(batches), and losses[l, i] is the loss before its update. The teacher gets no gradient and does not
    change, nor do batches. ValueError for other numbers of layers than the teacher has, no batches, and negative steps.
    """
    if len(student) != len(teacher) or not batches or steps < 0:
        found = f"{len(student)}, {len(batches)} and {steps}"
        raise ValueError(f"need as many layers as the teacher's {len(teacher)}, batches and steps >= 0; got {found}")
    losses, inputs = np.empty((len(student), steps)), batches
    for row, learner, master in zip(losses, student, teacher, strict=True):
        with torch.no_grad():
            targets = [master(x, *rest) for x in inputs]
        optimizer = fresh_optimizer(learner, rate)
        for step in range(steps):
            at = step % len(inputs)
            loss = F.mse_loss(learner(inputs[at], *rest), targets[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            row[step] = loss.item()
        inputs = targets
    return losses


def distill_model(
    student: Transformer, teacher: Transformer, tokens: Tensor, steps: int, rate: float = RATE, batch: int = BATCH
) -> np.ndarray:
    """`distill_layers` on the blocks, `batch` of the sequences in tokens `[N, T]` at a time."""
    batches, length = teacher.embedding(tokens).detach().split(batch), tokens.shape[1]
    positions = teacher.cos[:length], teacher.sin[:length]
    return distill_layers(list(student.blocks), list(teacher.blocks), batches, steps, rate, *positions, None)


def layer_errors(student: Transformer, teacher: Transformer, tokens: Tensor) -> np.ndarray:
    """Mean square error of each layer `[layers]`, fed by the teacher, on tokens `[N, T]`: a step that goes nowhere."""
    return distill_model(student, teacher, tokens, 1, rate=0.0, batch=len(tokens))[:, 0]


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run zeroquant`."""
    parser.add_argument("--bits", type=int, default=4, help="of weights, 2 to 8 (default 4); activations have 8")
    parser.add_argument("--group-size", type=int, default=GROUP, help=f"weights that share a scale (default {GROUP})")
    parser.add_argument("--steps", type=int, default=100, help="of distillation for each layer, 0: none (default 100)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Round and distill `model`; the weights can be saved, activations are rounded as it runs."""
    teacher = copy.deepcopy(model)
    quantize_model(model, args.bits, args.group_size)
    distill_model(model, teacher, tokens, args.steps)
    for layer in surgery.linears(model).values():  # from here on plain weights, under their plain names
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return {"bits per weight": args.bits + 16 / args.group_size, "bits per activation": 8.0}


def measure(lab: Lab, seed: int, bits: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Before and after the distillation: perplexity `[2]`, and errors of the layers on unseen text `[2, layers]`."""
    teacher, student, unseen = lab.model(), lab.model(), lab.validation[:16]
    quantize_model(student, bits, GROUP)
    before = lab.once(("zeroquant, rounded", bits), lambda: lab.perplexity(student))  # whatever the seed
    errors = [layer_errors(student, teacher, unseen)]
    distill_model(student, teacher, lab.calibration(seed), steps)
    errors.append(layer_errors(student, teacher, unseen))
    return np.array([before, lab.perplexity(student)]), np.array(errors)


def picture(perplexity: dict[int, np.ndarray], errors: np.ndarray, base: float) -> Figure:
    """Errors by layer at 3 bits, and perplexity by bits, before and after the distillation."""
    fig, (left, right) = panels(2, width=8.4)
    places, widths = np.arange(errors.shape[1]), sorted(perplexity)
    for at, (role, words) in enumerate({"baseline": "rounded", "method": "with LKD"}.items()):
        left.bar(places + 0.4 * at, errors[at], 0.4, color=COLOURS[role], label=words)
        right.plot(widths, [perplexity[bits][at] for bits in widths], **series(role), label=words)
    right.axhline(base, **series("reference"), label="full precision")
    left.set(xlabel="layer", ylabel="mean square error", xticks=places, title="each layer alone, 3 bits")
    right.set(xlabel="bits per weight", ylabel="perplexity", xticks=widths, title="the whole model")
    legend(left)
    legend(right)
    return fig


def claim(lab: Lab) -> Claim:
    """LKD lowers the error of every layer, and wins back a part of what rounding costs the model."""
    widths, steps, base = (4, 3, 2) if lab.full else (4, 3), 100 if lab.full else 60, lab.base_perplexity
    found = {bits: [measure(lab, seed, bits, steps) for seed in lab.seeds] for bits in widths}
    perplexity = {bits: np.mean([each for each, _ in runs], axis=0) for bits, runs in found.items()}
    errors = np.mean([each for _, each in found[3]], axis=0)
    won = {bits: (before - after) / (before - base) for bits, (before, after) in perplexity.items()}
    left = errors[1] / errors[0]
    sentence = (
        f"3-bit weights in groups of {GROUP} and 8-bit activations by token raise perplexity from {base:.1f} to "
        f"{perplexity[3][0]:.1f}; {steps} steps of distillation a layer leave {left.min():.0%} to {left.max():.0%} of "
        f"the layers' errors and lower it to {perplexity[3][1]:.1f}: {won[3]:.0%} of the loss is won back."
    )
    numbers = {"perplexity, full precision": base, "largest share of an error left, 3 bits": left.max()}
    for bits, (before, after) in perplexity.items():
        numbers |= {f"perplexity, {bits} bits, rounded": before, f"perplexity, {bits} bits, with LKD": after}
        numbers[f"loss won back, {bits} bits"] = won[bits]
    setting = (
        f"all block linears, symmetric; AdamW at {RATE:g}, {BATCH} of 128 training sequences of {lab.length} tokens a "
        f"step, seeds {lab.seeds}; errors on validation text"
    )
    lowered = all((after < before).all() for runs in found.values() for _, (before, after) in runs)
    holds = lowered and all(base < after < before for before, after in perplexity.values())
    return Claim(sentence, bool(holds), numbers, picture(perplexity, errors, base), setting)
