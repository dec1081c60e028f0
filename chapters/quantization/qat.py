"""Quantization-aware training: compute with rounded weights, and let gradients pass as if nothing had been rounded.

    forward    y  = s · rint(clip(w / s, Qn, Qp))
    backward   dw = dy  where Qn <= w / s <= Qp, else 0
               ds = 1 / √(N Qp) · Σ dy · (rint(w / s) − w / s  inside,  Qn below,  Qp above)

Rounding has derivative 0 almost everywhere, so nothing could be learned through it. The straight-through estimator
takes 1 instead where a weight can still choose among the codes, and 0 where it is clipped and a small change does
nothing. The full-precision weights move by such gradients until they round well. Learned step size quantization (LSQ)
learns s by the same rule. N weights add to the gradient of one s, which 1 / √(N Qp) brings to the size of the gradient
of a weight. That matters to SGD, and where gradients are clipped by their norm; Adam divides it out.
A teacher helps: the student's target at each token is then the whole distribution of the full-precision model, which
also pulls it less away from what needs no repair.

Saves    bytes: `bits` a weight, and 16 for each step that n weights share, instead of 16 a weight: 2 bits can be used.
Costs    training, with the weights in full precision and their optimizer's state. Post-training methods need neither.
Paper    Bengio et al. 2013, arXiv:1308.3432 (straight-through). Esser et al. 2020, arXiv:1902.08153 (LSQ), 2 and 3.7.
         Variants: TWN, arXiv:1605.04711; TernaryBERT, arXiv:2009.12812; LLM-QAT, arXiv:2305.17888.
Follows  the code of BinaryBERT and of hustzxd's LSQ: the mask looks at w / s before it is rounded, its ends Qn and Qp
         count as inside (in the paper as outside), ties go to the even number, the first s is 2 mean|w| / √Qp.
Symbols  x or w of any shape, cut as `x.reshape(groups, -1)`; scale `[groups]`: one s for a layer, as in the paper, for
         each row, or for a part of one; n = N numbers in a group. Qn = −2^(bits − 1) and Qp = 2^(bits − 1) − 1; for
         numbers that are never negative 0 and 2^bits − 1.
Kernel   kernels/quantization/qat.py
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import figure, legend, series
from chapters.lab import Lab
from chapters.quantization.uniform import round_weights
from minitfm import surgery, train
from minitfm.model import Transformer


def limits(bits: int, signed: bool = True) -> tuple[int, int]:
    """(Qn, Qp), the least and the largest code. ValueError for bits outside 2 .. 8, or 1 .. 8 if not signed."""
    least = 2 if signed else 1
    if isinstance(bits, bool) or bits not in range(least, 9):
        raise ValueError(f"bits must be an integer from {least} to 8, got {bits!r}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def cut(x: np.ndarray, groups: int) -> np.ndarray:
    """x as `[groups, n]`, at least float32. ValueError for an x that is empty, not finite, or not so divisible."""
    x = np.asarray(x)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"x must be finite and not empty, got shape {x.shape}, {(~np.isfinite(x)).sum()} not finite")
    if groups < 1 or x.size % groups:
        raise ValueError(f"groups must divide the {x.size} numbers of x, got {groups}")
    return x.astype(np.result_type(x, np.float32), copy=False).reshape(groups, -1)


def quotients(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x / scale as `[groups, n]`. ValueError unless scale is `[groups]`, positive and finite; others as `cut`."""
    if scale.ndim != 1 or not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"scale must be [groups], positive and finite, got shape {scale.shape}")
    with np.errstate(over="ignore"):  # what is far outside of the codes is clipped like the rest
        return cut(x, len(scale)) / scale[:, None]


def first_scale(x: np.ndarray, bits: int, groups: int = 1, signed: bool = True) -> np.ndarray:
    """Where LSQ begins: 2 mean|x| / √Qp of each group, `[groups]`, and 1 for a group of zeros. Errors as its parts.

    Source: LSQ, section 2.1.
    """
    size = np.abs(cut(x, groups)).mean(axis=1, dtype=np.float64)
    scale = (2 * size / math.sqrt(limits(bits, signed)[1])).astype(np.result_type(x, np.float32))
    return np.where(scale < np.finfo(scale.dtype).tiny, scale.dtype.type(1), scale)


def lsq_codes(x: np.ndarray, scale: np.ndarray, bits: int, signed: bool = True) -> np.ndarray:
    """Codes rint(clip(x / scale, Qn, Qp)), in the shape of x, int8 or (not signed) uint8; halves go to the even code.

    x of any shape is cut as `x.reshape(groups, -1)`, scale `[groups]` has one step for each. The quotient is taken in
    the precision of the two, at least float32. Raises ValueError for bits outside 2 .. 8 (1 .. 8 if not signed), an x
    that is empty or not finite, and a scale that is not `[groups]`, positive and finite, with groups dividing x.
    """
    low, high = limits(bits, signed)
    codes = np.rint(np.clip(quotients(x, scale), low, high))
    return codes.astype(np.int8 if signed else np.uint8).reshape(np.shape(x))


def lsq(x: np.ndarray, scale: np.ndarray, bits: int, signed: bool = True) -> np.ndarray:
    """The values that the codes of x stand for, scale · code, in the shape of x. Errors as `lsq_codes`."""
    codes = lsq_codes(x, scale, bits, signed).reshape(len(scale), -1)
    return (scale[:, None] * codes.astype(np.result_type(x, scale, np.float32))).reshape(np.shape(x))


def lsq_gradient(
    x: np.ndarray, scale: np.ndarray, dy: np.ndarray, bits: int, signed: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (dx, dscale) of a loss, from dy, its gradient at `lsq(x, scale, bits, signed)`, in their precision.

    With q = x / scale, not rounded, a number is inside where Qn <= q <= Qp, the ends included.
    dx, shaped like x, is dy inside and 0 outside. dscale `[groups]` is the sum over a group of n numbers of dy ·
    change, divided by √(n · Qp), where change = rint(q) − q inside, Qn below and Qp above.
    Raises ValueError as `lsq_codes`, and where dy is not finite or not shaped like x. Source: LSQ, section 2.1, 2.2.
    """
    (low, high), q = limits(bits, signed), quotients(x, scale)
    if np.shape(dy) != np.shape(x):
        raise ValueError(f"dy must be shaped like x, {np.shape(x)}, got {np.shape(dy)}")
    dy = cut(dy, len(scale))
    inside = (low <= q) & (q <= high)
    change = np.where(inside, np.rint(q) - q, np.clip(q, low, high))
    dscale = (dy * change).sum(axis=1) / math.sqrt(q.shape[1] * high)
    return np.where(inside, dy, 0).reshape(np.shape(x)), dscale


def straight_through(x: np.ndarray, dy: np.ndarray, limit: float = math.inf) -> np.ndarray:
    """dx for quantizers without a learned step: dy where −limit < x < limit, and 0 where x is at a limit or beyond.

    Like dy in shape and dtype; x is the number before it is rounded or clipped. Raises ValueError for shapes that
    differ and for a limit that is not positive. Source: TernaryBERT (limit 2.5) and LLM-QAT (limit 2).
    """
    if np.shape(x) != np.shape(dy) or not limit > 0:
        raise ValueError(f"need x and dy of one shape, limit > 0; got {np.shape(x)}, {np.shape(dy)}, limit {limit}")
    return np.where(np.abs(x) < limit, dy, np.zeros_like(dy))


def ternary(x: np.ndarray, groups: int = 1) -> np.ndarray:
    """x, cut as `x.reshape(groups, -1)`, as −a, 0 or a; in the shape of x. Ternary weight networks (TWN).

    What is greater than 0.7 mean|x| of its group in magnitude, and not equal to that, becomes ±a with its sign, the
    rest 0; a is the mean magnitude of what does. A group of zeros stays zero. Means are taken in float64, the result
    has the dtype of x, at least float32. Raises ValueError for an x that is empty or not finite, and for groups that
    do not divide it. Source: TernaryBERT, TwnQuantizer.
    """
    parts = cut(x, groups)
    size = np.abs(parts).astype(np.float64)
    kept = size > 0.7 * size.mean(axis=1, keepdims=True)
    a = np.sum(size, axis=1, where=kept) / np.maximum(kept.sum(axis=1), 1)
    return (a[:, None] * np.sign(parts) * kept).astype(parts.dtype).reshape(np.shape(x))


class LearnedStep(torch.autograd.Function):
    """`lsq` of a tensor with the gradients of `lsq_gradient`, signed codes; on CUDA both are the kernel's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        """x in any floating dtype, contiguous; scale float32 `[groups]`, positive. Values like x."""
        ctx.save_for_backward(x, scale)
        ctx.bits = bits
        if x.is_cuda:
            from kernels.quantization.qat import lsq as kernel

            return kernel(x, scale, bits)
        steps = scale[:, None]
        codes = (x.reshape(len(scale), -1) / steps).clamp(*limits(bits)).round()
        return (steps * codes).view_as(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and scale."""
        (x, scale), (low, high), dy = ctx.saved_tensors, limits(ctx.bits), gradients[0].contiguous()
        if x.is_cuda:
            from kernels.quantization.qat import lsq_gradient as kernel

            return *kernel(x, scale, dy, ctx.bits), None
        q = x.reshape(len(scale), -1) / scale[:, None]
        inside = (q >= low) & (q <= high)
        change = torch.where(inside, q.round() - q, q.clamp(low, high))
        dscale = (dy.view_as(q) * change).sum(1) / math.sqrt(q.shape[1] * high)
        return torch.where(inside.view_as(x), dy, 0), dscale, None


class FakeQuantLinear(nn.Linear):
    """A linear layer that multiplies by rounded weights, and is trained as if they were not.

    bits        codes of LSQ, 2 to 8; the steps are a parameter, `scale` `[groups]`. None: ternary, nothing is learned
                besides the weights
    group_size  neighbours in a row that share a step; None: the row. ValueError unless it divides the row
    """

    def __init__(self, layer: nn.Linear, bits: int | None, group_size: int | None = None) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device)
        size = layer.in_features if group_size is None else group_size
        if size < 1 or layer.in_features % size:
            raise ValueError(f"group_size must divide the {layer.in_features} columns, got {group_size}")
        self.weight, self.bias, self.bits, self.groups = layer.weight, layer.bias, bits, layer.weight.numel() // size
        if bits is not None:
            scale = first_scale(layer.weight.float().numpy(force=True), bits, self.groups)
            self.scale = nn.Parameter(torch.from_numpy(scale).to(layer.weight.device))

    def rounded(self) -> Tensor:
        """The weights that it multiplies by; gradients reach the weights behind them, and the steps."""
        if self.bits is not None:  # a step that training took through 0 counts by its magnitude
            return LearnedStep.apply(self.weight, self.scale.abs().clamp(min=1e-8), self.bits)
        size = self.weight.reshape(self.groups, -1).detach().abs()
        kept = size > 0.7 * size.mean(1, keepdim=True)
        values = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1) * kept
        values = values.view_as(self.weight) * self.weight.detach().sign()
        return values + (self.weight - self.weight.detach())  # + 0, which carries the gradient

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., in]` -> `[.., out]`."""
        return F.linear(x, self.rounded(), self.bias)


def prepare(model: Transformer, bits: int | None, group_size: int | None = None) -> list[nn.Parameter]:
    """Put a `FakeQuantLinear` in the place of every block linear; returns what is to be trained. Errors as there."""
    layers = {name: FakeQuantLinear(layer, bits, group_size) for name, layer in surgery.linears(model).items()}
    for name, layer in layers.items():
        surgery.replace(model, name, layer)
    return [parameter for layer in layers.values() for parameter in layer.parameters()]


@torch.no_grad()
def settle(model: Transformer) -> None:
    """Plain linear layers again, in place, which hold the rounded weights."""
    for name, layer in surgery.linears(model).items():
        if isinstance(layer, FakeQuantLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device)
            plain.weight, plain.bias = nn.Parameter(layer.rounded().detach()), layer.bias
            surgery.replace(model, name, plain)


def taught_by(teacher: Transformer) -> train.Loss:
    """A loss for `train.train`: the mean divergence KL(teacher ‖ student) of the next token's distributions."""

    def loss(student: Transformer, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(tokens[:, :-1]).float().log_softmax(-1)
        found = student(tokens[:, :-1]).float().log_softmax(-1)
        return F.kl_div(found, target, log_target=True, reduction="none").sum(-1).mean()

    return loss


BATCH, LENGTH, RATE = 8, 64, 1e-3  # sequences and tokens of a step; peak of AdamW's learning rate


def quantize_aware(
    model: Transformer, stream: Tensor, steps: int, bits: int | None, group_size: int | None = None,
    teach: bool = False, seed: int = 0,
) -> None:  # fmt: skip
    """Train the block linears of `model` for their rounded form on a token stream `[T]`, and round them; in place.

    teach: learn from the distributions of the model as it came, instead of from the text alone. Embedding and norms
    stay as they are, so that what is won is won back from the rounding. steps 0 rounds to LSQ's first grid.
    Raises ValueError as `FakeQuantLinear` and `train.Settings`.
    """
    loss = taught_by(copy.deepcopy(model).eval()) if teach else None
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trained = {id(parameter) for parameter in prepare(model, bits, group_size)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    if steps:
        length = min(LENGTH, model.config.context, len(stream))
        settings = train.Settings(steps, BATCH, length, "adamw", learning_rate=RATE, weight_decay=0.0, seed=seed)
        train.train(model, stream, settings, loss)
    settle(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(asked[name])


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run qat`."""
    parser.add_argument("--bits", type=int, default=2, help="2 to 8 (default 2)")
    parser.add_argument("--ternary", action="store_true", help="-a, 0 and a, no learned step, instead of --bits")
    parser.add_argument("--group-size", type=int, metavar="G", help="weights that share a step (default: a row)")
    parser.add_argument("--steps", type=int, default=200, help="of training; 0 only rounds (default 200)")
    parser.add_argument("--teacher", action="store_true", help="learn from the full-precision model, not from the text")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Train on the calibration tokens end to end (`--sequences` of them: many steps on few are learned by heart)."""
    if args.steps < 0:
        raise ValueError(f"--steps must not be negative, got {args.steps}")
    bits = None if args.ternary else args.bits
    quantize_aware(model, tokens.flatten(), args.steps, bits, args.group_size, args.teacher, args.seed)
    sizes = [(layer.weight.numel(), args.group_size or layer.in_features) for layer in surgery.linears(model).values()]
    groups = sum(count // size for count, size in sizes)
    seen = args.steps * BATCH * min(LENGTH, model.config.context, tokens.numel())
    return {
        "bits per weight": (bits or 2) + 16 * groups / sum(count for count, _ in sizes),
        "passes over the text": seen / tokens.numel(),
    }


NEAREST, FIRST = "rounded to nearest", "rounded to LSQ's first steps"
TRAINED, TAUGHT = "trained", "trained by a teacher"


def perplexities(lab: Lab, bits: int, steps: int) -> dict[str, float]:
    """Perplexity at `bits`, a grid for each row: rounded on two grids, trained, and taught; means over seeds."""
    model = lab.model()
    round_weights(model, bits=bits, granularity="channel")
    found = {NEAREST: [lab.perplexity(model)]}
    for words, count, teach in ((FIRST, 0, False), (TRAINED, steps, False), (TAUGHT, steps, True)):
        found[words] = []
        for seed in lab.seeds if count else (0,):
            model = lab.model()
            quantize_aware(model, lab.train_stream, count, bits, teach=teach, seed=seed)
            found[words].append(lab.perplexity(model))
    return {words: float(np.mean(values)) for words, values in found.items()}


def picture(found: dict[int, dict[str, float]], base: float) -> Figure:
    """Perplexity by bits and by how the weights were rounded."""
    fig, axes = figure()
    looks = (("muted", ""), ("baseline", "//"), ("second", ".."), ("method", ""))  # hatched: to tell without colour
    for place, (words, (role, hatch)) in enumerate(zip(found[2], looks, strict=True)):
        at, heights = [width + 0.2 * place for width in range(len(found))], [values[words] for values in found.values()]
        axes.bar(at, heights, 0.18, color=series(role)["color"], hatch=hatch, edgecolor="white", label=words)
    axes.axhline(base, **series("reference"), label="full precision")
    axes.set_xticks([width + 0.3 for width in range(len(found))], [f"{bits} bits" for bits in found])
    axes.set(ylabel="perplexity")
    axes.set_ylim(0, 1.5 * max(value for values in found.values() for value in values.values()))
    legend(axes, ncols=2)
    return fig


def claim(lab: Lab) -> Claim:
    """Rounding to 2 bits breaks the model, training it rounded repairs most, and with a teacher at least as much."""
    steps, base = (200 if lab.full else 100), lab.base_perplexity
    found = {bits: perplexities(lab, bits, steps) for bits in ((3, 2) if lab.full else (2,))}
    two = found[2]
    broken = min(two[NEAREST], two[FIRST])
    won = {words: math.log(broken / two[words]) / math.log(broken / base) for words in (TRAINED, TAUGHT)}
    helps = all(values[TAUGHT] <= values[TRAINED] for values in found.values())
    sentence = (
        f"Rounding the weights to 2 bits raises perplexity {base:.1f} to {broken:.1f} at least; {steps} steps of "
        f"training with learned steps bring it to {two[TRAINED]:.1f}, and with the full-precision model as teacher to "
        f"{two[TAUGHT]:.1f}: {won[TRAINED]:.0%} and {won[TAUGHT]:.0%} of the loss, in nats, is won back."
    )
    numbers = {f"perplexity, {bits} bits, {words}": v for bits, values in found.items() for words, v in values.items()}
    numbers |= {f"share of the loss won back, {words}": share for words, share in won.items()}
    setting = (
        f"weights of all blocks, a grid for each row; AdamW, rate {RATE}, {steps} steps of {BATCH} x {LENGTH} tokens "
        f"of the training text, embedding and norms fixed; seeds {lab.seeds} draw the text"
    )
    holds = broken > 1.5 * base and won[TRAINED] > 0.5 and helps
    return Claim(sentence, holds, numbers | {"perplexity, full precision": base}, picture(found, base), setting)
