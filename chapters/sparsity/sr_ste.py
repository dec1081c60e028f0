"""SR-STE: choose the N:M mask anew at every step, and let what it drops shrink, so that it stays dropped.

A mask that is chosen before training may drop the wrong weights. Here all weights are kept, only the largest are used,
and all learn. Gradients pass the mask as if it were not there (the straight-through estimator, STE), so a weight that
was dropped by mistake can come back. But a gradient that was taken at 0 says little about the weight that waits behind
it: two of about equal size trade places again and again, and each trade is a jolt. So what is dropped is decayed:

    E = 1 for the N largest |W| of every M neighbours, else 0                             found anew for every forward
    forward    y = x (E ⊙ W)ᵀ,      backward    G = ∂L/∂(E ⊙ W),  dense
    STE        W ← W − γ G
    SR-STE     W ← W − γ (G + λ (1 − E) ⊙ W)                                    λ > 0 pulls what is dropped towards 0

The sign matters: some surveys print + λ (1 − E) ⊙ W outside of −γ ( ), which would make dropped weights grow.
How restless masks are is their sparse architecture divergence, the number of entries in which two masks differ; between
one step and the next, divided by the number of weights, it is the rate of flips.

With AdamW there are two places for the term. In the gradient, as released: it passes through both moments and is
divided by √v like the rest, so a dropped weight loses the share γ λ / √v in a step, the more the smaller its gradients.
Decoupled, W ← W − γ λ (1 − E) ⊙ W: every dropped weight loses the same share γ λ, as weight decay has it, and neither
the moments nor the norm that is clipped see it. λ is then of the size of a weight decay: 2e-4 would do nothing.

Saves    after training what N:M saves, see chapters/sparsity/n_m.py: at 2:4 half the multiplications of a product.
Costs    all weights and their optimizer's state while training, and a mask for each step. No calibration.
Papers   Zhou et al.: Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, 2021, arXiv:2102.04010,
         section 3. With Adam: Hu et al. 2024, arXiv:2404.01847 (flip rates); Lu et al. 2023, arXiv:2302.01172.
Follows  the released code: λ = 2e-4, groups along the input axis, and of equal magnitudes the LATER stays, because it
         drops the first of an ascending sort. (Elsewhere in this book the earlier stays.)
Symbols  W, G, E `[out, in]`; N kept of M; γ the learning rate `rate`, λ `decay`.
Kernel   kernels/sparsity/sr_ste.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from chapters.shared.moe_lab import small
from chapters.shared.pruned_layers import pattern, report
from chapters.shared.student_lab import fresh
from chapters.sparsity.n_m import n_m_mask
from minitfm import surgery, train
from minitfm.model import Transformer


def sparse_mask(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    """Which n of every m neighbours stay: those of the largest magnitude, of equal ones those of the HIGHEST index.

    weight `[out, in]`, finite, stays as it was; magnitudes are compared in float64. Returns a bool mask `[out, in]`, C
    contiguous, True where a weight is kept.
    Raises ValueError unless 1 <= n <= m and m divides in, for a weight that is no matrix, empty or not finite.
    """
    return n_m_mask(weight[:, ::-1] if weight.ndim == 2 else weight, n, m)[:, ::-1].copy()


def sparse_weight(weight: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    """What the forward pass multiplies by: the weight where `sparse_mask` keeps it, else +0; in its dtype."""
    return np.where(sparse_mask(weight, n, m), weight, weight.dtype.type(0))


def checked_step(weight: np.ndarray, gradient: np.ndarray, **factors: float) -> None:
    """ValueError unless gradient is finite and shaped like weight, and all factors are finite and not negative."""
    if gradient.shape != weight.shape or not np.isfinite(gradient).all():
        raise ValueError(f"gradient must be finite and shaped like weight, {weight.shape}, got {gradient.shape}")
    for name, value in factors.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def refined_gradient(
    weight: np.ndarray, gradient: np.ndarray, n: int = 2, m: int = 4, decay: float = 2e-4
) -> np.ndarray:  # fmt: skip
    """G + λ (1 − E) ⊙ W: the gradient that the dense weight is trained by.

    weight, gradient `[out, in]`, floats: the dense weight, and the gradient of the loss with respect to
    `sparse_weight(weight, n, m)`, dense as well. E is `sparse_mask(weight, n, m)`: kept weights get no decay. Taken in
    the common dtype of the two, at least float32, and returned in the dtype of weight; decay 0 is plain STE.
    Neither argument is changed. Raises ValueError as `sparse_mask`, for a gradient that is not finite or of another
    shape, and for a decay that is negative or not finite. Source: section 3.3.
    """
    checked_step(weight, gradient, decay=decay)
    wide = np.result_type(weight, gradient, np.float32)
    dropped = np.where(sparse_mask(weight, n, m), 0, weight.astype(wide))
    return (gradient.astype(wide) + decay * dropped).astype(weight.dtype)


def refined_step(
    weight: np.ndarray, gradient: np.ndarray, n: int = 2, m: int = 4, rate: float = 0.1, decay: float = 2e-4
) -> tuple[np.ndarray, np.ndarray]:
    """One step of SGD, and the sparse weight of the next forward pass: (weight, sparse), both new, `[out, in]`.

    weight ← weight − rate · (G + λ (1 − E) ⊙ weight), by the mask E of the weight as it came. sparse is
    `sparse_weight` of the NEW weight, after that is rounded to its dtype. Arithmetic is in the common dtype of weight
    and gradient, at least float32, and rounded once. The new weight has the dtype of weight, sparse that of gradient,
    which is the dtype that the layer computes in: float32 weights with float16 gradients are trained so.
    Neither argument is changed. Raises ValueError as `refined_gradient`, for the rate as for the decay.
    """
    checked_step(weight, gradient, rate=rate, decay=decay)
    wide = np.result_type(weight, gradient, np.float32)
    change = refined_gradient(weight.astype(wide), gradient.astype(wide), n, m, decay)
    moved = (weight.astype(wide) - rate * change).astype(weight.dtype)
    return moved, sparse_weight(moved, n, m).astype(gradient.dtype)


def architecture_divergence(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> int:
    """Sparse architecture divergence ‖E − E′‖₁: in how many entries two masks of a model differ, over all layers.

    before, after: the bool masks of each layer, of any shapes. Two weights that trade places count 2. Raises ValueError
    unless both have the same number of layers, at least one, of the same shapes, TypeError for a mask that is not bool.
    Source: section 3.3.
    """
    if not before or [mask.shape for mask in before] != [mask.shape for mask in after]:
        raise ValueError(f"need masks of the same layers, got {[m.shape for m in before]}, {[m.shape for m in after]}")
    if wrong := {str(mask.dtype) for mask in [*before, *after]} - {"bool"}:
        raise TypeError(f"masks must be bool, got {', '.join(sorted(wrong))}")
    return sum(int((one != other).sum()) for one, other in zip(before, after, strict=True))


def torch_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """`sparse_mask` in torch, by rank: how many of the group are larger, or equal and later. A NaN is kept."""
    members = weight.detach().abs().unflatten(-1, (-1, m)).unbind(-1)
    ranks = [torch.zeros_like(member, dtype=torch.int8) for member in members]
    for later in range(m):
        for earlier in range(later):
            loses = members[earlier] <= members[later]
            ranks[earlier] += loses
            ranks[later] += ~loses
    return torch.stack([rank < n for rank in ranks], dim=-1).flatten(-2)


class SparseWeight(torch.autograd.Function):
    """`sparse_weight` of a dense weight, with the gradient of `refined_gradient`; on CUDA both are the kernel's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int, decay: float) -> Tensor:
        """weight `[out, in]`, m divides in; the sparse weight is like it."""
        ctx.pattern, ctx.decay = (n, m), decay
        if weight.is_cuda:
            from kernels.sparsity.sr_ste import sparse_weight as kernel

            ctx.save_for_backward(weight)
            return kernel(weight, n, m)
        mask = torch_mask(weight, n, m)
        ctx.save_for_backward(weight, mask)
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the dense weight."""
        (weight, *mask), gradient, (n, m) = ctx.saved_tensors, gradients[0], ctx.pattern
        if weight.is_cuda:
            from kernels.sparsity.sr_ste import refined_gradient as kernel

            return kernel(weight, gradient.contiguous(), n, m, ctx.decay), None, None, None
        return gradient + ctx.decay * weight.masked_fill(mask[0], 0), None, None, None


class RefinedLinear(nn.Linear):
    """A linear layer that multiplies by the N:M part of its weight, and trains all of it, `weight`. decay 0: STE."""

    def __init__(self, layer: nn.Linear, n: int, m: int, decay: float) -> None:
        """Takes over the parameters. ValueError unless 1 <= n <= m, m divides the inputs and decay is at least 0."""
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device)
        if not 1 <= n <= m or layer.in_features % m or not 0 <= decay < math.inf:
            needed = f"1 <= n <= m, m dividing {layer.in_features} columns, decay finite and not negative"
            raise ValueError(f"need {needed}, got n={n}, m={m}, decay={decay}")
        self.weight, self.bias, self.n, self.m, self.decay = layer.weight, layer.bias, n, m, decay

    def mask(self) -> Tensor:
        """The mask of the weight as it is now."""
        return torch_mask(self.weight, self.n, self.m)

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., in]` -> `[.., out]`."""
        return F.linear(x, SparseWeight.apply(self.weight, self.n, self.m, self.decay), self.bias)


def prepare(model: Transformer, n: int, m: int, decay: float) -> list[RefinedLinear]:
    """Put a `RefinedLinear` in the place of every block linear, all or none. ValueError as there, and for NaN."""
    for name, layer in surgery.linears(model).items():
        if not layer.weight.isfinite().all():
            raise ValueError(f"{name}.weight must be finite, it holds NaN or infinity")
    layers = {name: RefinedLinear(layer, n, m, decay) for name, layer in surgery.linears(model).items()}
    for name, layer in layers.items():
        surgery.replace(model, name, layer)
    return list(layers.values())


@torch.no_grad()
def settle(model: Transformer) -> None:
    """Plain linear layers again, in place, which hold the sparse weights."""
    for name, layer in surgery.linears(model).items():
        if isinstance(layer, RefinedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.weight.masked_fill(~layer.mask(), 0)), layer.bias
            surgery.replace(model, name, plain)


class Watch:
    """Hooks of a training run: the share of n:m mask entries that each step changed, in all layers, and its loss."""

    def __init__(self, layers: Iterable[nn.Linear], n: int, m: int) -> None:
        self.layers, self.pattern = list(layers), (n, m)
        self.flips, self.losses = list[float](), list[float]()
        self.masks = [torch_mask(layer.weight, n, m) for layer in self.layers]

    def after_step(self, step: int, model: Transformer) -> None:
        """For `train.train`, as is `progress`."""
        before, self.masks = self.masks, [torch_mask(layer.weight, *self.pattern) for layer in self.layers]
        changed = sum((one ^ other).sum().item() for one, other in zip(before, self.masks, strict=True))
        self.flips.append(changed / sum(mask.numel() for mask in before))

    def progress(self, now: train.Progress) -> None:
        self.losses.append(now.loss)


def train_sparse(
    model: Transformer, stream: Tensor, settings: train.Settings, n: int, m: int, decay: float, decoupled: bool = False
) -> Watch:
    """Train the linear layers of the blocks for their n:m form, and leave them in it, in place; all else trains too.

    stream `[T]` tokens. decay 0 is STE. decoupled: the term is no part of the gradient; after a step it takes the share
    rate · decay from what its forward pass had dropped. Raises ValueError as `prepare` and `train.train`.
    """
    layers = prepare(model, n, m, 0.0 if decoupled else decay)
    watch = Watch(layers, n, m)

    @torch.no_grad()
    def after_step(step: int, model: Transformer) -> None:
        for layer, mask in zip(layers, watch.masks, strict=True) if decoupled else ():
            layer.weight *= torch.where(mask, 1, 1 - settings.learning_rate * settings.rate(step) * decay)
        watch.after_step(step, model)

    train.train(model, stream, settings, after_step=after_step, progress=watch.progress)
    settle(model)
    return watch


BATCH, LENGTH = 8, 64  # sequences and tokens of a step
RATE = 5e-3  # peak of AdamW's learning rate, from scratch
DECAY = 2e-2  # with AdamW, see `claim`; the released 2e-4 is for SGD


def training(model: Transformer, stream: Tensor, steps: int, rate: float, seed: int) -> train.Settings:
    """How this chapter trains: AdamW, a cosine to zero."""
    length = min(LENGTH, model.config.context, len(stream))
    return train.Settings(steps, BATCH, length, "adamw", learning_rate=rate, weight_decay=0.0, seed=seed)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run sr_ste`."""
    parser.add_argument("--pattern", type=pattern, default=(2, 4), metavar="N:M", help="N kept of M (default 2:4)")
    parser.add_argument("--steps", type=int, default=200, help="of training, on --sequences sequences (default 200)")
    parser.add_argument("--decay", type=float, default=DECAY, help=f"lambda; 0 is STE (default {DECAY})")
    parser.add_argument("--decoupled", action="store_true", help="decay as weight decay does, not in the gradient")
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="save bitmaps and values, for `load_sparse`")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Train on, on the calibration tokens; the weights become those that the masks of the last step keep."""
    (n, m), stream = args.pattern, tokens.flatten()
    settings = training(model, stream, args.steps, 1e-3, args.seed)
    watch = train_sparse(model, stream, settings, n, m, args.decay, args.decoupled)
    changed = f"{watch.flips[0]:.2%} at first, {np.mean(watch.flips[len(watch.flips) // 2 :]):.3%} in the second half"
    return report(model, args, "sparsity.sr_ste") | {"mask entries that a step changes": changed}


class Run(NamedTuple):
    """A small model after training from scratch."""

    perplexity: float
    late: float  # share of mask entries that a step changes, in the second half
    flips: list[float]
    losses: list[float]


def from_scratch(lab: Lab, n: int, m: int, decay: float, steps: int, seed: int) -> Run:
    """Half the base model's width, from random weights that the seed draws; n = m: dense, but 2:4 masks are watched."""
    model, stream = fresh(small(lab.config), seed), lab.train_stream
    settings = training(model, stream, steps, RATE, seed)
    watch = Watch(surgery.linears(model).values(), 2, 4)
    if n < m:
        watch = train_sparse(model, stream, settings, n, m, decay)
    else:
        train.train(model, stream, settings, after_step=watch.after_step, progress=watch.progress)
    late = float(np.mean(watch.flips[steps // 2 :]))
    return Run(lab.perplexity(model.eval()), late, watch.flips, watch.losses)


def picture(found: dict[str, list[Run]], ends: dict[str, float]) -> Figure:
    """How many entries of the 2:4 masks change, the loss meanwhile, and where each pattern ends."""
    drawn, (left, middle, right) = panels(3, width=10.8, height=3.2)
    for name, role in (("2:4 STE", "baseline"), ("2:4 SR-STE", "method"), ("dense", "reference")):
        for axes, field, unit in ((left, "flips", 100), (middle, "losses", 1)):
            curve = unit * np.mean([getattr(run, field) for run in found[name]], axis=0)
            blocks = curve.reshape(40, -1).mean(axis=1)
            place = (np.arange(40) + 0.5) * len(curve) / 40
            axes.plot(place, blocks, **series(role), label=name)[0].set(marker="")
    left.set(xlabel="training step", ylabel="mask entries changed (%)", yscale="log", title="masks (dense: unused)")
    middle.set(xlabel="training step", ylabel="loss (nats)", title="training loss")
    right.axvline(ends["dense"], color=COLOURS["reference"], linestyle="--", label="dense")
    names = [name for name in ends if name != "dense"]
    colours = [COLOURS["method" if "SR" in name else "baseline"] for name in names]
    right.barh(range(len(names)), [ends[name] for name in names], color=colours)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="perplexity", title="at the end", xlim=(0.8 * min(ends.values()), None))
    for axes in (left, middle, right):
        legend(axes)
    return drawn


def claim(lab: Lab) -> Claim:
    """Decaying what the mask drops settles the masks, and a model trained from scratch ends no worse than by STE."""
    steps = 400 if lab.full else 80
    wanted = {"dense": (4, 4, 0.0), "2:4 STE": (2, 4, 0.0), "2:4 SR-STE": (2, 4, DECAY)}
    if lab.full:
        wanted |= {"2:4 SR-STE, λ 2e-4": (2, 4, 2e-4), "4:8 SR-STE": (4, 8, DECAY)}
        wanted |= {"1:4 STE": (1, 4, 0.0), "1:4 SR-STE": (1, 4, DECAY)}
    found = {name: [from_scratch(lab, *how, steps, seed) for seed in lab.seeds] for name, how in wanted.items()}
    perplexity = {name: float(np.mean([run.perplexity for run in runs])) for name, runs in found.items()}
    late = {name: float(np.mean([run.late for run in runs])) for name, runs in found.items()}
    pairs = {p: (perplexity[f"{p} SR-STE"], perplexity[f"{p} STE"]) for p in ("2:4", "1:4") if f"{p} STE" in found}
    beside = list(zip(found["2:4 SR-STE"], found["2:4 STE"], strict=True))
    ends = "; ".join(f"{p} {a:.1f} with SR-STE and {b:.1f} with STE" for p, (a, b) in pairs.items())
    sentence = (
        f"Perplexity after {steps} steps from scratch: dense {perplexity['dense']:.1f}; {ends}. In the second half a "
        f"step changes {late['2:4 SR-STE']:.2%} of the 2:4 masks with SR-STE, {late['2:4 STE']:.2%} with STE."
    )
    numbers = {f"perplexity, {name}": value for name, value in perplexity.items()}
    numbers |= {f"mask changed by a late step, {name}": value for name, value in late.items()}
    numbers |= {"seeds where SR-STE is better, 2:4": sum(a.perplexity < b.perplexity for a, b in beside)}
    setting = (
        f"half the base width; AdamW, rate {RATE}, cosine, {BATCH} x {LENGTH} tokens a step, term in the gradient; "
        f"λ {DECAY}: the best of 2e-4, 2e-3, 2e-2 on seed 0; seeds {lab.seeds} draw weights and text; the 80 steps of "
        "the quick budget tell flips apart, not qualities"
    )
    holds = all(a.late < b.late for a, b in beside) and all(a <= b for a, b in pairs.values())
    return Claim(sentence, holds, numbers, picture(found, perplexity), setting)
