"""Routing: a gate sends each token to the k experts that it scores highest, as far as these have room.

    p = softmax(logits + noise)                                        [tokens, experts]
    expert[t] = the k largest of p[t],   weight[t] = p[t, expert[t]],  renormalised before dropping, after it, or never
    C = round(factor · k · tokens / experts)                           the capacity: places at each expert
    slot[t, j] = how many stand before it in the line of its expert;   slot >= C: dropped, its weight is 0
    y[t] = Σ_j weight[t, j] · E_expert[t, j](x[t]),   and y = 0, which leaves x of x + y, for what all experts dropped

A fixed capacity makes each expert's work a matrix of known size. So the gate must spread its tokens. But to an expert
that is a little better it sends more, which trains that one faster. Two losses work against it:

    balance = experts · Σ_e f_e P_e     f_e the share of choices that went to e (a count: no gradient), P_e the mean of
                                        p over the tokens; 1 where all experts are chosen alike, at most `experts`
    z       = mean (log Σ_e exp logits)²                                     keeps logits small, where floats are exact

Saves    operations: with E experts a layer has E times the weights, and uses k experts' share of them for each token.
Costs    memory for all the experts; what is dropped; a token's result depends on those that are routed with it, later
         ones among them: lines by choice are not causal.
Paper    Fedus et al.: Switch, 2021, arXiv:2101.03961, section 2; Lepikhin et al.: GShard, 2020, arXiv:2006.16668.
         Noise: Riquelme et al.: V-MoE, 2021, arXiv:2106.05974. z loss: Zoph et al.: ST-MoE, 2022, arXiv:2202.08906.
Follows  of equal scores the lower expert is chosen. Lines are served by choice (GShard, V-MoE, Tutel: all first choices
         before any second) or by token (DeepSpeed's top-k). Renormalised "never" is Switch and V-MoE, "before" is Tutel
         and Mixtral, "after" is DeepSpeed. Mixtral reports k times our balance loss.
Symbols  logits, p `[tokens, experts]`; expert, slot int64 and weight `[tokens, k]`; load int64 `[experts]`.
Kernel   kernels/moe/routing.py
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from chapters.claims import Claim
from chapters.lab import Lab
from chapters.shared import moe_lab
from minitfm.model import Transformer

Array = TypeVar("Array", np.ndarray, Tensor)
Renormalise = Literal["never", "before", "after"]
By = Literal["choice", "token"]


class Routing(NamedTuple, Generic[Array]):
    """Where tokens go: what a router decides, and all that experts need to know.

    expert    int64 `[tokens, k]`, the chosen experts, best first, also where the choice was dropped
    weight    `[tokens, k]`, what the expert's output is multiplied by; 0 where dropped
    slot      int64 `[tokens, k]`, the place in the expert's line, no two alike; dropped where slot >= capacity
    load      int64 `[experts]`, how long the lines were, before anyone was dropped
    capacity  places at each expert
    """

    expert: Array
    weight: Array
    slot: Array
    load: Array
    capacity: int

    @property
    def kept(self) -> Array:
        """Bool `[tokens, k]`: which choices found a place."""
        return self.slot < self.capacity

    @property
    def dropped(self) -> float:
        """The share of all choices that found none."""
        return 1 - float(self.kept.sum()) / math.prod(self.kept.shape)


def capacity(
    tokens: int, experts: int, k: int = 1, factor: float = 1.0, rule: str = "round", multiple: int = 1, least: int = 1
) -> int:
    """Places at each expert, from factor · k · tokens / experts (float64, from left to right) by a rule.

    rule "round" (Python's, halves to even), "ceil" or "floor" makes it whole; then it is raised to `least`, and then to
    the next multiple of `multiple`. So it is never 0. DeepSpeed: "ceil", least 4. V-MoE: "ceil", multiple 4.
    Raises ValueError for another rule, an integer argument below 1, and a factor that is not positive and finite.
    """
    for name, value in (("tokens", tokens), ("experts", experts), ("k", k), ("multiple", multiple), ("least", least)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rules = {"round": round, "ceil": math.ceil, "floor": math.floor}
    if rule not in rules:
        raise ValueError(f"rule must be one of {', '.join(rules)}, got {rule!r}")
    if not 0 < factor < math.inf:
        raise ValueError(f"factor must be positive and finite, got {factor}")
    places = max(rules[rule](factor * k * tokens / experts), least)
    return -(-places // multiple) * multiple


def softmax(logits: np.ndarray) -> np.ndarray:
    """p `[tokens, experts]`, at least float32. ValueError unless logits are a finite, non-empty matrix."""
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"logits must be a non-empty [tokens, experts] matrix, got shape {logits.shape}")
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite, they hold NaN or infinity")
    logits = logits.astype(np.result_type(logits, np.float32))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def choose(scores: np.ndarray, k: int) -> np.ndarray:
    """The k experts of the largest scores `[tokens, experts]`, finite, best first, int64 `[tokens, k]`.

    Of equal scores the lower expert comes first. Raises ValueError unless 1 <= k <= experts.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be from 1 to the {scores.shape[1]} experts, got {k}")
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def queue(
    expert: np.ndarray, experts: int, by: By = "choice", arrival: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Everyone's place in the line before its expert, and how long the lines are: slot `[tokens, k]`, load `[experts]`.

    expert int `[tokens, k]`, those of a token all different; slot[t, j] counts the choices of the same expert that are
    served before it. By "choice": first every token's choice 0, then every token's choice 1, and so on. By "token": all
    k of the first token, then those of the next. Tokens come in the order in which `arrival`, a permutation of
    range(tokens), lists them; None: as they stand. Both results are int64; an expert that nobody chose has load 0.
    Raises ValueError for an expert outside range(experts), another `by`, and an arrival that is no permutation.
    """
    tokens, k = expert.shape
    if expert.size and not 0 <= expert.min() <= expert.max() < experts:
        raise ValueError(f"expert must be from 0 to {experts - 1}, got {expert.min()} to {expert.max()}")
    if by not in ("choice", "token"):
        raise ValueError(f'by must be "choice" or "token", got {by!r}')
    order = np.arange(tokens) if arrival is None else np.asarray(arrival)
    if order.shape != (tokens,) or (np.sort(order) != np.arange(tokens)).any():
        raise ValueError(f"arrival must list each of the {tokens} tokens once, got shape {order.shape}")
    line = np.arange(expert.size).reshape(tokens, k)[order]  # who is served when: indices into expert.ravel()
    line = (line.T if by == "choice" else line).ravel()
    chosen = expert.ravel()[line]
    load = np.bincount(chosen, minlength=experts)
    grouped = line[np.argsort(chosen, kind="stable")]  # expert by expert, each in the order of service
    slot = np.empty(expert.size, np.int64)
    slot[grouped] = np.arange(expert.size) - np.repeat(np.cumsum(load) - load, load)
    return slot.reshape(tokens, k), load


def weigh(p: np.ndarray, expert: np.ndarray, kept: np.ndarray, renormalise: Renormalise = "never") -> np.ndarray:
    """The weights `[tokens, k]` of the chosen experts, 0 where not kept; dtype of p `[tokens, experts]`.

    expert int and kept bool `[tokens, k]`. "never": p of the expert. "before": that over its sum over all k choices of
    the token, dropped ones included, so that what is left may be less than 1 (and with k = 1 is 1, which teaches the
    gate nothing). "after": over its sum over the kept ones, so that it is 1 in all unless all were dropped.
    A sum of 0 gives weights of 0. Raises ValueError for another `renormalise`.
    """
    if renormalise not in ("never", "before", "after"):
        raise ValueError(f'renormalise must be "never", "before" or "after", got {renormalise!r}')
    weight = np.take_along_axis(p, expert, axis=1)
    counted = kept if renormalise == "after" else np.ones_like(kept)
    total = (weight * counted).sum(axis=1, keepdims=True)
    if renormalise != "never":
        weight = weight / np.where(total > 0, total, 1)
    return weight * kept


def route(
    logits: np.ndarray, k: int, capacity: int | None = None, renormalise: Renormalise = "never",
    noise: np.ndarray | None = None, by: By = "choice", arrival: np.ndarray | None = None,
) -> Routing[np.ndarray]:  # fmt: skip
    """Route tokens by their logits `[tokens, experts]`, finite, to k experts that have `capacity` places each.

    logits + noise, in the dtype of logits, at least float32, decide who is chosen, as by `choose`, and their softmax
    the weights, as by `weigh`; noise, if any, is shaped like logits. Lines form as in `queue`. capacity None: a place
    for every token, so that nothing is dropped. Raises ValueError for a capacity below 1, noise of another shape or not
    finite, and as `softmax`, `choose`, `queue` and `weigh` do. No argument is changed.
    """
    if noise is not None and noise.shape != logits.shape:
        raise ValueError(f"noise must be shaped like logits, {logits.shape}, got {noise.shape}")
    scores = logits.astype(np.result_type(logits, np.float32))
    scores = scores if noise is None else scores + noise.astype(scores.dtype)
    p, places = softmax(scores), len(scores) if capacity is None else capacity
    if places < 1:
        raise ValueError(f"capacity must be at least 1 or None, got {capacity}")
    expert = choose(scores, k)
    slot, load = queue(expert, scores.shape[1], by, arrival)
    return Routing(expert, weigh(p, expert, slot < places, renormalise), slot, load, places)


def balance_loss(p: np.ndarray, expert: np.ndarray) -> float:
    """experts · Σ_e f_e P_e of gates p `[tokens, experts]` and chosen experts int `[tokens, k]`.

    f_e is the share of all tokens · k choices that are e, before any is dropped; P_e the mean of p[:, e]. It is 1 for
    lines of equal length. GShard counts first choices only: pass expert[:, :1]. Source: Switch, section 2.2.
    Raises ValueError unless both are matrices with a row for each token, of which there is one, and k is not 0.
    """
    if p.ndim != 2 or expert.ndim != 2 or len(p) != len(expert) or expert.size == 0:
        raise ValueError(f"p and expert must have a row for each token, got shapes {p.shape} and {expert.shape}")
    share = np.bincount(expert.ravel(), minlength=p.shape[1]) / expert.size
    return float(p.shape[1] * (share * p.mean(axis=0)).sum())


def z_loss(logits: np.ndarray) -> float:
    """The mean over tokens of (log Σ_e exp logits[t, e])², logits `[tokens, experts]`, also where exp overflows.

    Raises ValueError unless logits are a finite, non-empty matrix. Source: ST-MoE, equation 5.
    """
    softmax(logits)  # refuses what is no matrix of finite numbers
    logits = logits.astype(np.result_type(logits, np.float32))
    largest = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]
    return float((total**2).mean())


def routed(
    logits: Tensor, k: int, capacity: int | None = None, renormalise: Renormalise = "never",
    noise: Tensor | None = None, by: By = "choice", arrival: Tensor | None = None,
) -> Routing[Tensor]:  # fmt: skip
    """`route` for tensors; the gradient reaches logits through the weights. Errors as there.

    On CUDA, where no gradient is wanted, the kernel does it all in one launch.
    """
    places = len(logits) if capacity is None else capacity
    check(logits, k, places, renormalise, by, noise)
    scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    scores = scores if noise is None else scores + noise
    if logits.is_cuda and not (scores.requires_grad and torch.is_grad_enabled()):
        from kernels.moe.routing import route as kernel

        expert, weight, slot, load = kernel(scores.contiguous(), k, places, renormalise, None, by, arrival)
        return Routing(expert.long(), weight, slot.long(), load.long(), places)
    p = scores.softmax(1)
    expert = scores.detach().argsort(dim=1, descending=True, stable=True)[:, :k]
    slot, load = queued(expert, logits.shape[1], by, arrival)
    weight, kept = p.gather(1, expert), slot < places
    if renormalise != "never":
        total = (weight * kept if renormalise == "after" else weight).sum(1, keepdim=True)
        weight = weight / torch.where(total > 0, total, 1)
    return Routing(expert, weight * kept, slot, load, places)


def check(logits: Tensor, k: int, places: int, renormalise: str, by: str, noise: Tensor | None) -> None:
    """Refuse what `route` refuses. On CUDA the kernel itself marks what is not finite, by weights of NaN."""
    if logits.dim() != 2 or logits.numel() == 0:
        raise ValueError(f"logits must be a non-empty [tokens, experts] matrix, got shape {tuple(logits.shape)}")
    if not 1 <= k <= logits.shape[1] or places < 1:
        raise ValueError(f"need k from 1 to {logits.shape[1]} and a capacity of 1 or more, got {k=} and {places}")
    if renormalise not in ("never", "before", "after") or by not in ("choice", "token"):
        raise ValueError(f'renormalise is "never", "before" or "after", by "choice" or "token": {renormalise=}, {by=}')
    if noise is not None and noise.shape != logits.shape:
        raise ValueError(f"noise must be shaped like logits, {tuple(logits.shape)}, got {tuple(noise.shape)}")
    if not logits.is_cuda and not torch.isfinite(logits if noise is None else logits + noise).all():
        raise ValueError("logits and noise must be finite, they hold NaN or infinity")


def queued(expert: Tensor, experts: int, by: By = "choice", arrival: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`queue` for tensors, without its checks."""
    line = torch.arange(expert.numel(), device=expert.device).view_as(expert)
    line = line if arrival is None else line[arrival]
    line = (line.T if by == "choice" else line).flatten()
    chosen = expert.flatten()[line]
    load = torch.bincount(chosen, minlength=experts)
    rank = torch.arange(expert.numel(), device=expert.device)
    rank = rank - (load.cumsum(0) - load).repeat_interleave(load)
    slot = torch.empty_like(rank)
    slot[line[chosen.argsort(stable=True)]] = rank
    return slot.view_as(expert), load


@dataclass(frozen=True)
class Gate:
    """How a `moe_lab.MoE` routes and is penalised: a policy, as `moe_lab.Policy` says.

    k, renormalise, by as in `route`; factor of `capacity`, by rule "round" (None: nothing is dropped); noise: standard
    deviation · experts of normal noise on the logits in training (V-MoE: 1); balance, z: weights of the two losses.
    """

    k: int = 1
    factor: float | None = 1.0
    renormalise: Renormalise = "never"
    by: By = "choice"
    noise: float = 0.0
    balance: float = 0.01
    z: float = 0.001

    def __call__(self, logits: Tensor, training: bool = False) -> Routing[Tensor]:
        """Route tokens by their logits `[tokens, experts]`."""
        tokens, experts = logits.shape
        places = None if self.factor is None else capacity(tokens, experts, self.k, self.factor)
        noise = torch.randn_like(logits) * (self.noise / experts) if training and self.noise else None
        return routed(logits, self.k, places, self.renormalise, noise, self.by)

    def penalty(self, logits: Tensor, routing: Routing[Tensor]) -> Tensor:
        """What training adds to the loss of the text for one layer: balance · balance_loss + z · z_loss."""
        share = routing.load.to(logits.dtype) / routing.load.sum()
        balance = logits.shape[1] * (share * logits.softmax(1).mean(0)).sum()
        return self.balance * balance + self.z * logits.logsumexp(1).pow(2).mean()


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run routing`."""
    parser.add_argument("--experts", type=int, default=8, help="in each layer, of 1 / k of its width (default 8)")
    parser.add_argument("--k", type=int, default=2, help="experts for a token (default 2)")
    parser.add_argument("--factor", type=float, default=1.0, help="of the capacity (default 1)")
    parser.add_argument("--renormalise", choices=("never", "before", "after"), default="before")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss (default 0.01)")
    parser.add_argument("--steps", type=int, default=100, help="of training from random weights (default 100)")


def demonstrate(lab: Lab, args: argparse.Namespace) -> dict[str, float]:
    """Train a small mixture by those options, and say how its gates spread the measuring text."""
    if not 1 <= args.k <= args.experts or args.steps < 1:
        raise ValueError(f"need 1 <= k <= experts and steps >= 1, got {args.k}, {args.experts} and {args.steps}")
    gate = Gate(args.k, args.factor, args.renormalise, balance=args.balance)
    return moe_lab.summary(lab, fresh(lab, gate, args.steps, args.seed, args.experts))


GATES = {"no balance loss": Gate(2, 1.0, "before", balance=0.0), "balance loss": Gate(2, 1.0, "before")}


def fresh(lab: Lab, gate: Gate, steps: int, seed: int, experts: int = 8) -> Transformer:
    """A small mixture trained with this gate; its experts have 1 / k of a dense layer's width."""
    return moe_lab.fresh(lab, moe_lab.Mixture(gate, experts, share=gate.k), steps, seed)


def claim(lab: Lab) -> Claim:
    """Without the balance loss the gates collapse onto few experts, which drop much; with it they spread."""
    steps, full, drop = 300 if lab.full else 100, moe_lab.FULLEST, moe_lab.DROPPED
    runs = [[moe_lab.summary(lab, fresh(lab, gate, steps, seed)) for seed in lab.seeds] for gate in GATES.values()]
    halved = sum(a[drop] > 2 * b[drop] and a[full] > b[full] for a, b in zip(*runs, strict=True))
    without, balanced = ({name: float(np.mean([run[name] for run in found])) for name in found[0]} for found in runs)
    sentence = (
        f"Without the balance loss, gates send the fullest of 8 experts {without[full]:.1f} times the mean load and "
        f"drop {without[drop]:.0%} of the choices at capacity factor 1, at perplexity {without['perplexity']:.1f}; "
        f"with it {balanced[full]:.1f} times and {balanced[drop]:.0%}, less than half as much in {halved} of "
        f"{len(lab.seeds)} runs of {steps} steps, at perplexity {balanced['perplexity']:.1f}."
    )
    means = dict(zip(GATES, (without, balanced), strict=True))
    numbers = {f"{name}, {words}": value for words, found in means.items() for name, value in found.items()}
    setting = (
        f"half the base model's width, random weights, 8 experts of half a dense layer's width, k = 2, renormalised "
        f"before dropping, capacity factor 1 in training too; balance 0 or 0.01, z 0.001; AdamW, {steps} steps of "
        f"{moe_lab.BATCH} x {moe_lab.LENGTH} tokens; seeds {lab.seeds} draw weights and text"
    )
    holds = halved == len(lab.seeds) and balanced["perplexity"] < without["perplexity"]
    models = {words: fresh(lab, gate, steps, lab.seeds[0]) for words, gate in GATES.items()}
    return Claim(sentence, holds, numbers, moe_lab.draw(models, lab.validation[:16]), setting)
