"""Batch priority: where an expert has too little room, it serves those first whom the gate is most sure about.

    s[t]  = max_e p[t, e]                          how sure the gate is of token t, p = softmax(logits + noise)
    t is served before u   if s[t] > s[u], or s[t] = s[u] and t < u;  all first choices before any second one
    slot[t, j] = how many are served before it by the same expert;  slot >= C: dropped, as in routing

First come, first served drops whoever stands last in the batch, whatever it is. With priority an expert drops those
that it matters least for: their gates are small, so are the outputs that are lost. Then C may be less than the fair
share, and whole tokens are skipped, above all those that no expert wants much. Nothing is learned: the order may change
after training. V-MoE also has two losses of its own against long lines, in the place of routing's balance loss:

    importance = Var_e(Σ_t p[t, e]) / Mean_e²                        squared coefficient of variation (of all E experts)
    load       = Var_e(L) / Mean_e(L)²,   L[e] = Σ_t P(logits[t, e] + new noise > the k-th largest noisy logit of t)

Saves    operations and memory of the experts: C is the size of their matrices, whatever comes.
Costs    a sort of the batch by s. The order is not causal: a later token, and another sequence of the batch, decides
         whether this one is served. So it is for encoders (V-MoE sees whole images), and for training; a decoder that
         makes one token at a time cannot repeat what it did when it read the whole text.
Paper    Riquelme et al.: Scaling Vision with Sparse Mixture of Experts, 2021, arXiv:2106.05974, section 4, appendix A.
Follows  google-research/vmoe: ties by place, lines by choice, gates not renormalised, C = ceil(factor · k · T / E)
         raised to a multiple of 4, noise of standard deviation 1 / E, population variance. The paper also ranks by the
         sum of the k gates. Tutel: the same order, gates renormalised before, sample variance, mean of both losses.
Symbols  logits, p `[tokens, experts]`; score s float and arrival int64 `[tokens]`; expert, slot int64 `[tokens, k]`.
Kernel   kernels/moe/batch_priority.py
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.moe import routing
from chapters.moe.routing import Renormalise, Routing, queued, routed
from chapters.shared import moe_lab
from minitfm import evaluate
from minitfm.model import Transformer

Score = Literal["max", "sum"]
Order = Literal["max", "sum", "arrival", "random"]


def priority(score: np.ndarray) -> np.ndarray:
    """The order of service, int64 `[tokens]`: numbers of tokens, that of the largest score `[tokens]` first.

    Of equal scores the token that stands first comes first; 0 and -0 are equal. Scores may be of any float dtype and
    infinite. Raises ValueError unless they are a vector without NaN. Source: V-MoE, algorithm 2.
    """
    if score.ndim != 1 or np.isnan(score).any():
        raise ValueError(f"score must be a vector without NaN, got shape {score.shape}")
    return np.argsort(-score, kind="stable")


def queue(expert: np.ndarray, score: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rank, slot, load): how many tokens of larger score there are, and lines by choice in which these come first.

    expert int `[tokens, k]`, score `[tokens]`; rank int64 `[tokens]` is the inverse of `priority`, slot `[tokens, k]`
    and load `[experts]` are those of routing's `queue`. Errors as there and in `priority`.
    """
    if score.shape != expert.shape[:1]:
        raise ValueError(f"score must have one number for each of {len(expert)} tokens, got shape {score.shape}")
    arrival = priority(score)
    return np.argsort(arrival), *routing.queue(expert, experts, "choice", arrival)


def route(
    logits: np.ndarray, k: int, capacity: int | None = None, renormalise: Renormalise = "never",
    noise: np.ndarray | None = None, score: Score = "max",
) -> Routing[np.ndarray]:  # fmt: skip
    """Routing's `route`, lines by choice, those first whose largest gate is largest; score "sum": the sum of their k.

    Gates are those with noise. The sum of all of them is 1: for k = experts it is no priority. Errors as in routing's
    `route`; ValueError for another score.
    """
    if score not in ("max", "sum"):
        raise ValueError(f'score must be "max" or "sum", got {score!r}')
    free = routing.route(logits, k, None, "never", noise)  # nothing is dropped: its weights are the gates
    value = free.weight[:, 0] if score == "max" else free.weight.sum(axis=1)
    return routing.route(logits, k, capacity, renormalise, noise, "choice", priority(value))


def importance_loss(p: np.ndarray, correction: int = 0) -> float:
    """Variance over the experts of Σ_t p[t, e], over the square of its mean; p `[tokens, experts]`.

    It is 0 for even gates, and where all are 0; any unit of p gives the same. Computed in float64.
    The variance divides by experts - correction: 0 is V-MoE's, 1 Tutel's.
    Raises ValueError unless p is a finite, non-empty matrix with more experts than `correction`.
    """
    if p.ndim != 2 or p.size == 0 or p.shape[1] <= correction or not np.isfinite(p).all():
        raise ValueError(f"p must be finite, of tokens and more than {correction} experts, got shape {p.shape}")
    return spread(p.sum(axis=0, dtype=np.float64), correction)


def spread(amount: np.ndarray, correction: int) -> float:
    """The squared coefficient of variation; 0 where all is 0."""
    mean = amount.mean()
    return float((amount / mean).var(ddof=correction)) if mean else 0.0  # the square of a tiny mean would be 0


def load_loss(logits: np.ndarray, noisy: np.ndarray, k: int, std: float, correction: int = 0) -> float:
    """The same of the load that the experts had to expect, which has a gradient where a count has none.

    logits and noisy `[tokens, experts]`, without and with the noise that chose, normal with standard deviation `std`.
    With new noise on logits[t, e] alone, e is among the k chosen if it passes the k-th largest of noisy[t]: with
    probability 1 - Φ((that - logits[t, e]) / std). Their sum over the tokens is the load. 0 where all of it is 0.
    Computed in float64. No argument is changed.
    Raises ValueError unless logits and noisy are finite, non-empty matrices of one shape with more experts than
    `correction`, 1 <= k <= experts, and std is positive and finite. Source: V-MoE, appendix A.2.
    """
    if logits.shape != noisy.shape or logits.ndim != 2 or logits.size == 0 or logits.shape[1] <= correction:
        raise ValueError(f"logits and noisy must be matrices of one shape, got {logits.shape} and {noisy.shape}")
    if not (np.isfinite(logits).all() and np.isfinite(noisy).all()):
        raise ValueError("logits and noisy must be finite, they hold NaN or infinity")
    if not 1 <= k <= logits.shape[1] or not 0 < std < math.inf:
        raise ValueError(f"need k from 1 to {logits.shape[1]} and a positive, finite std, got {k=} and {std=}")
    threshold = np.sort(noisy.astype(np.float64), axis=1)[:, -k, None]
    missing = (threshold - logits) / (std * math.sqrt(2))
    chance = np.vectorize(math.erfc, otypes=[np.float64])(missing) / 2
    return spread(chance.sum(axis=0), correction)


def prioritised(
    logits: Tensor, k: int, capacity: int | None = None, renormalise: Renormalise = "never",
    noise: Tensor | None = None, order: Order = "max", seed: int = 0,
) -> Routing[Tensor]:  # fmt: skip
    """`route` for tensors, and two orders to compare with: "arrival", as tokens stand, and "random", drawn by the seed.

    The gradient reaches logits through the weights. Errors as in `route`.
    """
    if order not in ("max", "sum", "arrival", "random"):
        raise ValueError(f'order must be "max", "sum", "arrival" or "random", got {order!r}')
    if order == "arrival":
        return routed(logits, k, capacity, renormalise, noise)
    places = len(logits) if capacity is None else capacity
    routing.check(logits, k, places, renormalise, "choice", noise)
    free = routed(logits, k, None, "never", noise)
    gate = free.weight.detach()
    value = gate[:, 0] if order == "max" else gate.sum(1)
    if order == "random":
        value = torch.rand(len(gate), generator=torch.Generator().manual_seed(seed)).to(gate.device)
    slot, load = placed(free.expert, value.contiguous(), logits.shape[1])
    return Routing(free.expert, weighed(free.weight, slot < places, renormalise), slot, load, places)


def placed(expert: Tensor, score: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """slot and load of `queue`, for tensors; on CUDA by the kernel, as long as counting beats a sort."""
    if expert.is_cuda:
        from kernels.moe import batch_priority as kernel

        if len(expert) <= kernel.MOST_TOKENS:
            _, slot, load = kernel.queue(expert, score, experts)
            return slot.long(), load.long()
    return queued(expert, experts, "choice", score.argsort(descending=True, stable=True))


def weighed(gate: Tensor, kept: Tensor, renormalise: Renormalise) -> Tensor:
    """Routing's `weigh` from the gates of the chosen experts, `[tokens, k]`, for tensors."""
    if renormalise != "never":
        total = (gate * kept if renormalise == "after" else gate).sum(1, keepdim=True)
        gate = gate / torch.where(total > 0, total, 1)
    return gate * kept


class Decided(NamedTuple):
    """A routing of tensors that knows the noisy logits it was made from; the other fields are those of `Routing`."""

    expert: Tensor
    weight: Tensor
    slot: Tensor
    load: Tensor
    capacity: int
    noisy: Tensor

    @property
    def kept(self) -> Tensor:
        """Bool `[tokens, k]`: which choices found a place."""
        return self.slot < self.capacity


@dataclass(frozen=True)
class PriorityGate:
    """V-MoE's gate for a `moe_lab.MoE`, and others to compare with: a policy, as `moe_lab.Policy` says.

    k, renormalise as in `route`, order and seed as in `prioritised`; factor of the capacity, which is rounded up to a
    multiple of 4; noise: standard deviation · experts of normal noise in training; importance, load: weights of the two
    losses, the second in training with noise only. V-MoE trains with noise 1 and two equal weights.
    """

    k: int = 2
    factor: float = 1.0
    renormalise: Renormalise = "never"
    order: Order = "max"
    seed: int = 0
    noise: float = 0.0
    importance: float = 0.0
    load: float = 0.0

    def __call__(self, logits: Tensor, training: bool = False) -> Decided:
        """Route tokens by their logits `[tokens, experts]`."""
        tokens, experts = logits.shape
        places = routing.capacity(tokens, experts, self.k, self.factor, "ceil", multiple=4)
        noise = torch.randn_like(logits) * (self.noise / experts) if training and self.noise else None
        found = prioritised(logits, self.k, places, self.renormalise, noise, self.order, self.seed)
        noisy = logits if noise is None else logits + noise
        return Decided(found.expert, found.weight, found.slot, found.load, found.capacity, noisy)

    def penalty(self, logits: Tensor, routing: Decided) -> Tensor:
        """What training adds to the loss of the text for one layer: importance and load loss, weighted."""
        charge = self.importance * variation(logits.softmax(1).sum(0))
        if routing.noisy is not logits:
            missing = routing.noisy.gather(1, routing.expert[:, -1:]) - logits
            chance = torch.special.ndtr(missing * (-logits.shape[1] / self.noise))
            charge = charge + self.load * variation(chance.sum(0))
        return charge


def variation(amount: Tensor) -> Tensor:
    """`spread` for tensors, of the population."""
    mean = amount.mean()
    return amount.var(correction=0) / torch.where(mean == 0, 1, mean) ** 2


def gate_mass(decided: Decided) -> float:
    """The share of the gates of all choices that their experts kept: 1 where nothing is dropped."""
    gate = decided.noisy.softmax(1).gather(1, decided.expert)
    return float((gate * decided.kept).sum() / gate.sum())


@torch.no_grad()
def quality(model: Transformer, gate: PriorityGate, tokens: Tensor, batch: int = 16) -> tuple[float, float]:
    """(perplexity, `gate_mass`, a mean over layers and batches) of a model whose `moe_lab.MoE`s route by `gate`.

    tokens `[N, T]`, `batch` rows of which are routed together. The model keeps that gate.
    """
    layers = [module for module in moe_lab.set_policy(model, gate).modules() if isinstance(module, moe_lab.MoE)]
    loss, masses = 0.0, []
    for rows in tokens.split(batch):
        loss += evaluate.nll(model, rows).double().sum().item()
        masses += [gate_mass(layer.routing) for layer in layers]
    return math.exp(loss / tokens[:, 1:].numel()), float(np.mean(masses))


FACTORS = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0)
ORDERS: dict[Order, str] = {"max": "batch priority", "arrival": "first come", "random": "random order"}
LEVEL = 0.01  # perplexities that differ by less than this share are level


def sweep(model: Transformer, tokens: Tensor, k: int = 2, factors: tuple[float, ...] = FACTORS) -> np.ndarray:
    """`quality` by order and capacity factor, `[orders, factors, 2]`."""
    gates = [[PriorityGate(k, factor, "before", order=order) for factor in factors] for order in ORDERS]
    return np.array([[quality(model, gate, tokens) for gate in row] for row in gates])


def draw(found: np.ndarray, factors: tuple[float, ...] = FACTORS) -> Figure:
    """Perplexity and kept gate mass by capacity factor, from `sweep`."""
    fig, axes = panels(2, width=7.6, height=2.8)
    for words, role, rows in zip(ORDERS.values(), ("method", "baseline", "muted"), found, strict=True):
        for place, values in zip(axes, rows.T, strict=True):
            place.plot(factors, values, **series(role), label=words)
    axes[0].set(xlabel="capacity factor", ylabel="perplexity", title="quality")
    axes[1].set(xlabel="capacity factor", ylabel="share of gates", title="kept gate mass", ylim=(0, None))
    legend(axes[1])
    return fig


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run batch_priority`."""
    parser.add_argument("--factor", type=float, default=0.5, help="of the capacity, after training (default 0.5)")
    parser.add_argument("--steps", type=int, default=100, help="of training at capacity factor 1 (default 100)")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float]:
    """Train a small mixture first come, first served, and serve the measuring text in three orders."""
    if args.steps < 1:
        raise ValueError(f"steps must be at least 1, got {args.steps}")
    gates = {words: PriorityGate(2, args.factor, "before", order=order) for order, words in ORDERS.items()}
    routing.capacity(8, 8, 2, args.factor)  # a bad factor is refused before the training
    model = routing.fresh(lab, routing.GATES["balance loss"], args.steps, args.seed)
    found = {words: quality(model, gate, lab.validation) for words, gate in gates.items()}
    names = ("perplexity", "kept gate mass")
    return {f"{name}, {words}": value for words, pair in found.items() for name, value in zip(names, pair, strict=True)}


def claim(lab: Lab) -> Claim:
    """After training at capacity factor 1, priority beats first come at small factors and is level at large ones."""
    steps = 300 if lab.full else 100
    models = (routing.fresh(lab, routing.GATES["balance loss"], steps, seed) for seed in lab.seeds)
    runs = np.array([sweep(model, lab.validation) for model in models])  # [seeds, orders, factors, 2]
    over = runs[:, 1, :, 0] / runs[:, 0, :, 0] - 1  # how much worse first come is
    small, large = np.array(FACTORS) <= 0.5, np.array(FACTORS) >= 1
    won, level = over[:, small].min(1) > LEVEL, abs(over[:, large]).max(1) < LEVEL
    mean = runs.mean(0)
    numbers = {
        f"{measure}, {words}, C = {factor:g}": mean[i, j, m]
        for i, words in enumerate(ORDERS.values())
        for j, factor in enumerate(FACTORS)
        for m, measure in enumerate(("perplexity", "kept gate mass"))
    }
    setting = (
        f"the balanced mixtures of the routing chapter: half the base model's width, random weights, {steps} steps at "
        f"C = 1, first come, k = 2 of 8 experts, renormalised before dropping; order and C change at inference only, "
        f"16 x {lab.length - 1} tokens are routed together, so not causally; seeds {lab.seeds} draw weights and text"
    )
    return Claim(in_words(mean, won, level), bool(won.all() and level.all()), numbers, draw(mean), setting)


def in_words(mean: np.ndarray, won: np.ndarray, level: np.ndarray) -> str:
    """The claim's sentence, from means as `sweep` gives them and the runs in which each half of it was found."""
    over, half = mean[:, :, 0] / mean[0, :, 0] - 1, FACTORS.index(0.5)
    first, drawn = (
        [f"{round(100 * one, 1) + 0:+.1f}% at {c:g}" for one, c in zip(row, FACTORS, strict=True)] for row in over[1:]
    )
    return (
        f"Served first come instead of by batch priority, perplexity is more than {LEVEL:.0%} higher at every capacity "
        f"factor C <= 0.5 in {won.sum()} of {len(won)} runs, and within {LEVEL:.0%} at every C >= 1 in {level.sum()} "
        f"({', '.join(first)}); a random order, which starves no sequence, costs {', '.join(drawn[: half + 1])}; "
        f"at 0.5 priority keeps {mean[0, half, 1]:.0%} of the gate mass, first come {mean[1, half, 1]:.0%}."
    )
