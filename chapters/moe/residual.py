"""PR-MoE: every token passes through one fixed layer; an expert corrects it, by a share that is learned.

    c[t] = softmax(W x[t] + b)                                              two coefficients, from the token itself
    y[t] = c[t, 0] · gate[t] · E_expert[t](x[t]) + c[t, 1] · mlp(x[t])      dropped: c[t, 1] · mlp(x[t]) alone

Top-2 routing was found to help because the second expert corrects the first. The first of two need not be chosen: let
it be the same layer for everyone, which no token waits for and which sends none to another device. Two observations
shape the model: experts help more in later layers, so these get more of them (the pyramid); and a fixed layer with one
expert is as good as two experts (the residual). Softmax over two is a sigmoid of the difference:

    c[t, 0] = 1 / (1 + e^-z),   z = (W[0] - W[1]) · x[t] + b[0] - b[1],   c[t, 1] = 1 - c[t, 0]

Saves    against top-2: half of the tokens' traffic to experts and back; a dropped token still has its fixed layer.
         Pyramid: the weights of the experts that earlier layers do without.
Costs    a fixed layer that all tokens share is one expert less to choose from; two more rows of weights in each layer.
         A pyramid spreads unevenly over devices: each layer has its own number of experts to deal out.
Paper    Rajbhandari et al.: DeepSpeed-MoE, 2022, arXiv:2201.05596, section 4.1.
Follows  DeepSpeed's `MoE(use_residual=True)`: the expert's answer first, times its raw gate, then the coefficient. What
         a dropped token would have had from its expert is 0, and the coefficients stay as they are.
Symbols  x, mlp `[tokens, dim]`; weight `[2, dim]`, bias `[2]`; rows `[n, dim]`, what experts answered, in any order;
         source int `[tokens]`, each token's row or -1 where it was dropped; gate `[tokens]`.
Kernel   kernels/moe/residual.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import COLOURS, MARKERS, legend, panels, series
from chapters.lab import Lab
from chapters.moe.routing import Gate
from chapters.shared import moe_lab
from minitfm.config import Config
from minitfm.model import FeedForward, MakeFeedForward, Transformer


class Gradients(NamedTuple):
    """What the arguments of `mix` that have a gradient receive, each in its argument's shape."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    rows: np.ndarray
    gate: np.ndarray
    mlp: np.ndarray


def coefficients(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """c `[tokens, 2]`: softmax of x weightᵀ + bias over the two, for x `[tokens, dim]`, also where exp overflows."""
    logits = x @ weight.T + bias
    c = np.exp(logits - logits.max(axis=1, keepdims=True))
    return c / c.sum(axis=1, keepdims=True)


def mix(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, source: np.ndarray, gate: np.ndarray,
    mlp: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """y `[tokens, dim]`: c[t, 0] · gate[t] · rows[source[t]] + c[t, 1] · mlp[t], and c[t, 1] · mlp[t] for source -1.

    x, mlp `[tokens, dim]`, weight `[2, dim]`, bias `[2]`, rows `[n, dim]` (n may be 0), gate `[tokens]`, all float;
    source int `[tokens]`, -1 to n - 1, no row twice. c = softmax(x weightᵀ + bias) over the two, as by `coefficients`.
    dtype: that of the arguments, the widest if they differ. No argument is changed.
    Raises ValueError for other shapes, a source that is out of range or used twice, and what is not finite.
    """
    require_fit(x, weight, bias, rows, source, gate, mlp)
    c = coefficients(x, weight, bias)
    expert = np.concatenate((rows, np.zeros_like(rows, shape=(1, rows.shape[1]))))[source]  # -1: the row of zeros
    return c[:, :1] * gate[:, None] * expert + c[:, 1:] * mlp


def mix_backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, source: np.ndarray,
    gate: np.ndarray, mlp: np.ndarray,
) -> Gradients:  # fmt: skip
    """Gradients of Σ dy · mix(..) in x, weight, bias, rows, gate and mlp, for dy `[tokens, dim]`; the rest as in `mix`.

    x's is the part that comes through the coefficients. A row that no token takes gets 0, and so does the gate of a
    dropped token, but its coefficients learn. ValueError as in `mix`, and for a dy of another shape or not finite.
    """
    require_fit(x, weight, bias, rows, source, gate, mlp)
    if dy.shape != x.shape or not np.isfinite(dy).all():
        raise ValueError(f"dy must be finite and shaped like x, {x.shape}, got shape {dy.shape}")
    c, taken = coefficients(x, weight, bias), source >= 0
    expert = np.concatenate((rows, np.zeros_like(rows, shape=(1, rows.shape[1]))))[source]
    with_expert, with_mlp = (dy * expert).sum(axis=1), (dy * mlp).sum(axis=1)
    pull = c[:, 0] * c[:, 1] * (gate * with_expert - with_mlp)  # on logit 0; logit 1 is pulled the other way
    logits = np.stack((pull, -pull), axis=1)  # of the widest dtype, as everything goes into it
    drows = np.zeros_like(rows, dtype=logits.dtype)
    drows[source[taken]] = (c[:, :1] * gate[:, None] * dy)[taken]
    parts = logits @ weight, logits.T @ x, logits.sum(axis=0), drows, c[:, 0] * with_expert, c[:, 1:] * dy
    return Gradients(*(part.astype(logits.dtype) for part in parts))


def require_fit(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, source: np.ndarray, gate: np.ndarray,
    mlp: np.ndarray,
) -> None:  # fmt: skip
    """Refuse what `mix` cannot serve."""
    if x.ndim != 2 or x.size == 0 or rows.ndim != 2:
        raise ValueError(f"x must be [tokens, dim], not empty, and rows [n, dim], got {x.shape} and {rows.shape}")
    tokens, dim = x.shape
    wanted = {"weight": (2, dim), "bias": (2,), "rows": (len(rows), dim), "gate": (tokens,), "mlp": (tokens, dim)}
    given = {"weight": weight, "bias": bias, "rows": rows, "gate": gate, "mlp": mlp}
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} must be {shape} for x of {x.shape}, got {given[name].shape}")
    for name, values in {"x": x, **given}.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, it holds NaN or infinity")
    if source.shape != (tokens,) or source.min() < -1 or source.max() >= len(rows):
        raise ValueError(f"source must be {tokens} numbers from -1 to {len(rows) - 1}, got {source}")
    taken = source[source >= 0]
    if len(np.unique(taken)) < len(taken):
        raise ValueError(f"source must name no row twice, got {source}")


def mixed(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, source: Tensor, gate: Tensor, mlp: Tensor
) -> Tensor:  # fmt: skip
    """`mix` for tensors, without its checks: on CUDA one launch of the kernel, and one for its gradients."""
    if x.is_cuda:
        return Mix.apply(*(part.contiguous() for part in (x, weight, bias, rows, source, gate.float(), mlp)))
    c = (x @ weight.T + bias).softmax(1)
    expert = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))[source]
    return c[:, :1] * gate[:, None].to(x.dtype) * expert + c[:, 1:] * mlp


class Mix(torch.autograd.Function):
    """The kernel and its backward, for autograd."""

    @staticmethod
    def forward(ctx, *given: Tensor) -> Tensor:
        """Arguments of `mix`; all are kept for the backward pass, nothing else is."""
        from kernels.moe.residual import mix as kernel

        ctx.save_for_backward(*given)
        x, weight, bias, rows, source, gate, mlp = given
        return kernel(x, weight, bias, rows, source, gate, mlp)

    @staticmethod
    def backward(ctx, *dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for all but source."""
        from kernels.moe.residual import mix_backward as kernel

        x, weight, bias, rows, gate, mlp = kernel(dy[0].contiguous(), *ctx.saved_tensors)
        return x, weight, bias, rows, None, gate, mlp


class Residual(moe_lab.MoE):
    """A fixed layer and several experts, of which a token visits one: the feed-forward layer of PR-MoE.

    mlp, experts  modules `[n, dim] -> [n, dim]`; router as in `moe_lab.MoE`; coefficient: Linear(dim, 2)
    policy        with k = 1: the gate's weight is that of the only expert
    """

    def __init__(
        self, mlp: nn.Module, experts: Iterable[nn.Module], router: nn.Module, coefficient: nn.Linear,
        policy: moe_lab.Policy,
    ) -> None:  # fmt: skip
        super().__init__(experts, router, policy)
        self.mlp, self.coefficient = mlp, coefficient

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., dim]`, in the same shape. Raises ValueError for a policy that chooses several experts."""
        tokens = x.flatten(0, -2)
        logits = self.router(tokens.float())
        self.routing = self.policy(logits, self.training)
        if self.routing.expert.shape[1] != 1:
            raise ValueError(f"policy must choose one expert, k = 1, got k = {self.routing.expert.shape[1]}")
        self.penalty = self.policy.penalty(logits, self.routing)
        rows, source = answers(tokens, self.experts, self.routing)
        weight, bias = self.coefficient.weight, self.coefficient.bias
        return mixed(tokens, weight, bias, rows, source, self.routing.weight[:, 0], self.mlp(tokens)).view_as(x)


def answers(x: Tensor, experts: Iterable[nn.Module], routing: moe_lab.Decision) -> tuple[Tensor, Tensor]:
    """rows `[kept, dim]`, expert after expert, and source int64 `[tokens]`: which of them is a token's, or -1."""
    expert = torch.where(routing.kept[:, 0], routing.expert[:, 0], -1)
    source, rows, start = torch.full_like(expert, -1), [x[:0]], 0
    for number, layer in enumerate(experts):
        token = (expert == number).nonzero()[:, 0]
        if len(token):
            rows.append(layer(x[token]))
            source[token] = torch.arange(start, start + len(token), device=x.device)
            start += len(token)
    return torch.cat(rows), source


@dataclass(frozen=True)
class Pyramid:
    """A `feed_forward` seam: in every layer a `Residual` of dense layers of 1 / share of the dense layer's width.

    experts  how many, by step of the pyramid: (15,) in all layers, (7, 15) in the first and in the second half
    share    2: the fixed layer and one expert together cost what the dense layer costs
    """

    policy: moe_lab.Policy
    experts: tuple[int, ...] = (15,)
    share: int = 2

    def __call__(self, config: Config, layer: int) -> nn.Module:
        """That layer. Raises ValueError for a step without an expert, or more steps than layers."""
        if not 1 <= len(self.experts) <= config.layers or min(self.experts) < 1:
            raise ValueError(f"experts must be 1 to {config.layers} numbers of 1 or more, got {self.experts}")
        experts = self.experts[layer * len(self.experts) // config.layers]
        config = replace(config, hidden_dim=config.hidden_dim // self.share)
        router = nn.Linear(config.dim, experts, bias=False)
        nn.init.normal_(router.weight, std=0.02)
        several = [FeedForward(config) for _ in range(experts)]
        return Residual(FeedForward(config), several, router, nn.Linear(config.dim, 2), self.policy)


def sizes(model: Transformer) -> tuple[int, int]:
    """Weights of all `moe_lab.MoE` layers, routers and coefficients left out: those held, those used by a token."""
    held = used = 0
    for layer in (module for module in model.modules() if isinstance(module, moe_lab.MoE)):
        fixed = sum(weight.numel() for weight in layer.mlp.parameters()) if isinstance(layer, Residual) else 0
        one = sum(weight.numel() for weight in layer.experts[0].parameters())
        k = layer.policy.k if isinstance(layer.policy, Gate) else 1
        held, used = held + fixed + one * len(layer.experts), used + fixed + one * k
    return held, used


@torch.no_grad()
def expert_shares(model: Transformer, tokens: Tensor) -> list[tuple[float, float]]:
    """For each `Residual`, on tokens `[N, T]`: the mean of c[:, 0], and the share of the tokens that were dropped."""
    layers = [module for module in model.modules() if isinstance(module, Residual)]
    seen: dict[nn.Module, float] = {}

    def note(layer: nn.Module, given: tuple[Tensor]) -> None:
        seen[layer] = float(layer.get_submodule("coefficient")(given[0]).softmax(-1)[..., 0].mean())

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return [(seen[layer], layer.routing.dropped) for layer in layers]


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run residual`."""
    parser.add_argument("--experts", type=int, nargs="+", default=[7, 15], help="by step of the pyramid (7 15)")
    parser.add_argument("--share", type=int, default=2, help="they have 1 / SHARE of a dense layer's width (default 2)")
    parser.add_argument("--factor", type=float, default=1.0, help="of the capacity (default 1)")
    parser.add_argument("--steps", type=int, default=50, help="of training from random weights (default 50)")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float]:
    """Train a small PR-MoE by those options; say what it holds and uses, and how much each layer leans on experts."""
    if args.share < 1 or args.steps < 1:
        raise ValueError(f"share and steps must be at least 1, got {args.share} and {args.steps}")
    layers = Pyramid(Gate(1, args.factor), tuple(args.experts), args.share)
    model = moe_lab.fresh(lab, layers, args.steps, args.seed)
    held, used = sizes(model)
    numbers = {"perplexity": lab.perplexity(model), "feed-forward weights": held, "of them, for a token": used}
    for layer, (share, dropped) in enumerate(expert_shares(model, lab.validation[:16])):
        numbers |= {f"layer {layer}, mean share of the expert": share, f"layer {layer}, dropped tokens": dropped}
    return numbers


LAYERS: dict[str, MakeFeedForward] = {  # all use as many weights for a token; the first three hold as many
    "top-1": moe_lab.Mixture(Gate(1), 8),
    "residual": Pyramid(Gate(1), (15,)),
    "top-2": moe_lab.Mixture(Gate(2, renormalise="after"), 16, share=2),
    "pyramid": Pyramid(Gate(1), (7, 15)),
    "upside down": Pyramid(Gate(1), (15, 7)),
}
QUICK = ("top-1", "residual", "pyramid")


def claim(lab: Lab) -> Claim:
    """A fixed layer and one expert beat one expert at equal operations and weights; the sentence tells of pyramids."""
    steps, names = (200, tuple(LAYERS)) if lab.full else (50, QUICK)
    models = {name: [moe_lab.fresh(lab, LAYERS[name], steps, seed) for seed in lab.seeds] for name in names}
    found = {name: [lab.perplexity(model) for model in trained] for name, trained in models.items()}
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    wins = sum(a < b for a, b in zip(found["residual"], found["top-1"], strict=True))
    held = {name: sizes(trained[0])[0] for name, trained in models.items()}
    beside = f", two of 16 such experts {mean['top-2']:.1f}" if lab.full else ""
    sentence = (
        f"At equal operations and weights a fixed layer and one of 15 experts of half the width reach perplexity "
        f"{mean['residual']:.1f}, one of 8 experts of full width {mean['top-1']:.1f}{beside}: the residual beats top-1 "
        f"in {wins} of {len(lab.seeds)} runs of {steps} steps; a pyramid of 7 and then 15 experts, with "
        f"{held['pyramid'] / held['residual']:.0%} of those weights, reaches {mean['pyramid']:.1f}{turned(found)}."
    )
    setting = (
        f"half the base model's width, random weights, capacity factor 1 in training too, balance 0.01, z 0.001; "
        f"AdamW, {steps} steps of {moe_lab.BATCH} x {moe_lab.LENGTH} tokens; seeds {lab.seeds} draw weights and text"
    )
    numbers = {f"perplexity, {name}": value for name, value in mean.items()}
    numbers |= {f"feed-forward weights, {name}": value for name, value in held.items()}
    return Claim(sentence, wins == len(lab.seeds), numbers, draw(models, found, lab.validation[:16]), setting)


def turned(found: dict[str, list[float]]) -> str:
    """What the control says, if it was trained: as many weights, but more experts in the early layers."""
    if "upside down" not in found:
        return ""
    late = [a < b for a, b in zip(found["pyramid"], found["upside down"], strict=True)]
    verdict = "reproduced" if all(late) else "not reproduced"
    return (
        f", upside down {np.mean(found['upside down']):.1f}: that experts help more in later layers, which shows in "
        f"{sum(late)} of {len(late)} runs, is {verdict}"
    )


def draw(models: dict[str, list[Transformer]], found: dict[str, list[float]], tokens: Tensor) -> Figure:
    """Perplexities of all runs against the weights they hold, and how far residual layers lean on their experts."""
    fig, (left, right) = panels(2, width=7.4, height=2.8)
    roles = ("baseline", "method", "third", "accent", "second")
    for (name, trained), role in zip(models.items(), roles, strict=False):
        held = [sizes(model)[0] / 1e3 for model in trained]
        left.scatter(held, found[name], color=COLOURS[role], marker=MARKERS[role], s=28, label=name)
        shares = expert_shares(trained[0], tokens)
        if shares:
            right.plot(range(len(shares)), [share for share, _ in shares], **series(role), label=name)
    left.set(xlabel="feed-forward weights, thousands", ylabel="perplexity", title="equal operations", ymargin=0.15)
    right.set(xlabel="layer", ylabel="mean share of the expert", title="what is learned", ylim=(0, 1))
    legend(left, fontsize=9)
    return fig
