"""Rewinding: what is left after pruning has to be trained again, and the question is which end of training to repeat.

A pruned model is worse, so it is retrained. From which weights, and at which learning rates? A training run of T steps
used the rates r[0] .. r[T−1] and left the weights W[0] (at its start), W[k] (before step k) and W[T]. With the masks
that come from W[T], and t steps to replay:

    method        weights start at   rates of the retraining steps
    lottery       W[0]               r[0] .. r[T−1]      the whole run again: the "winning ticket"
    weight        W[T−t]             r[T−t] .. r[T−1]    weight rewinding
    lr            W[T]               r[T−t] .. r[T−1]    learning-rate rewinding
    fine-tuning   W[T]               t times one small rate

One-shot: prune to the end, retrain once. Iterative: prune a share of what is left, retrain, and again; masks only lose.
Retraining must not wake what is dropped. So the mask stands in the optimizer: of a dropped weight the gradient counts
for nothing, and weight and moments are 0 after every step, whatever they were.

Saves    what pruning saves, see chapters/pruning/magnitude.py; rewinding decides how good the model is that is left.
Costs    T or t steps of training for each round. weight and lottery need weights from the middle of the first run.
Papers   Frankle and Carbin: The Lottery Ticket Hypothesis, 2018, arXiv:1803.03635. Frankle et al.: Linear Mode
         Connectivity, 2019, arXiv:1912.05671 (to a later step). Renda et al.: Comparing Rewinding and Fine-tuning,
         2020, arXiv:2003.02389. Loshchilov and Hutter: Decoupled Weight Decay, 2017, arXiv:1711.05101.
Follows  open_lth's masks and, on demand, its count: it drops ⌈share · left⌉ + 1, here it is round(share · left).
Symbols  weight, gradient, mask, mean, square of one shape; mask True where a weight is kept; mean and square are Adam's
         moments m and v of the gradient; T steps of the first run, t of them replayed.
Kernel   kernels/pruning/rewinding.py: the masked step of AdamW, in one pass.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.pruning.magnitude import iterative_sparsities, keep_largest
from chapters.shared.pruned_layers import Masks, add_options, apply_masks, checked_sparsity, dropped, magnitudes, report
from chapters.shared.retraining import Plan, Stages, Tensors, copied, masked_optimizers, trained_small
from chapters.shared.student_lab import checksum, progress_bar
from minitfm import checkpoint, evaluate, surgery, train
from minitfm.model import Transformer

METHODS = ("lottery", "weight", "lr", "fine-tuning")
Moments = tuple[np.ndarray, np.ndarray, np.ndarray]  # weight, mean, square


def kept_counts(weights: int, share: float, levels: int, open_lth: bool = False) -> list[int]:
    """How many weights are left at each level of iterative pruning: `levels` + 1 counts, the first is `weights`.

    Each level drops round(share · left) of those left, Python's round, halves to even. With open_lth it drops
    ⌈share · left⌉ + 1, as that code does: it keeps what is above the element of index ⌈share · left⌉ of the sorted
    list. By either rule one weight always stays.
    Raises ValueError unless weights >= 1, 0 <= share < 1 and levels >= 0.
    """
    if levels < 0:
        raise ValueError(f"levels must not be negative, got {levels}")
    counts = [weights]
    dropped(weights, share)  # its checks, where there is no level to prune to
    for _ in range(levels):
        left = counts[-1]
        gone = math.ceil(share * left) + 1 if open_lth else dropped(left, share)
        counts.append(max(1, left - gone))
    return counts


def next_masks(weights: Sequence[np.ndarray], masks: Sequence[np.ndarray], kept: int) -> list[np.ndarray]:
    """One level: of the weights that `masks` keep, the `kept` largest magnitudes of all layers together stay.

    weights: arrays of any shapes, finite; masks: a bool array like each; returns new masks, arguments stay as they are.
    A weight that is dropped already stays dropped, however large, and is not counted, even where kept weights are 0.
    Of equal magnitudes the earlier layer's stays, within a layer that of the lowest flat index.
    Raises ValueError unless every weight has a mask of its shape, for weights that are empty or not finite, and unless
    1 <= kept <= the number of weights that masks keep; TypeError for a mask that is not bool.
    """
    if not weights or [w.shape for w in weights] != [mask.shape for mask in masks]:
        raise ValueError(f"masks must be shaped like weights, {[w.shape for w in weights]}, got "
                         f"{[mask.shape for mask in masks]}")  # fmt: skip
    for mask in masks:
        if mask.dtype != bool:
            raise TypeError(f"masks must be bool, got {mask.dtype}")
    left = np.concatenate([mask.ravel() for mask in masks])
    if not 1 <= kept <= left.sum():
        raise ValueError(f"kept must be from 1 to the {left.sum()} weights that are left, got {kept}")
    together = np.concatenate([magnitudes(weight).ravel() for weight in weights])
    left[left] = keep_largest(together[left], kept)
    parts = np.split(left, np.cumsum([weight.size for weight in weights])[:-1])
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def retraining_rates(
    method: str, rates: np.ndarray, replayed: int, constant: float | None = None
) -> tuple[int, np.ndarray]:  # fmt: skip
    """Where a method retrains from and how fast: (start, learning rate of each retraining step).

    method    one of METHODS: "lottery", "weight", "lr", "fine-tuning", as in the table above
    rates     `[T]`, those of the first run, positive and finite
    replayed  t, 1 to T; "lottery" replays all T whatever it is
    constant  the rate of "fine-tuning", positive and finite; None: rates[T − 1], the last one. Others ignore it
    start is the step k whose W[k] are the weights to start from: 0, T − t or T. The rates are a new float64 array.
    Raises ValueError for whatever is not as said.
    """
    rates = np.array(rates, dtype=np.float64)
    if rates.ndim != 1 or rates.size == 0 or not (np.isfinite(rates).all() and (rates > 0).all()):
        raise ValueError(f"rates must be [T], positive and finite, got shape {rates.shape}, {rates}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 1 <= replayed <= rates.size:
        raise ValueError(f"replayed must be from 1 to the {rates.size} steps of the first run, got {replayed}")
    if method == "lottery":
        return 0, rates
    if method == "fine-tuning":
        last = float(rates[-1] if constant is None else constant)
        if not 0 < last < math.inf:
            raise ValueError(f"constant must be positive and finite, got {constant}")
        return rates.size, np.full(replayed, last)
    start = rates.size - replayed
    return (start if method == "weight" else rates.size), rates[start:]


def masked_adamw(
    weight: np.ndarray, gradient: np.ndarray, mask: np.ndarray, mean: np.ndarray, square: np.ndarray, step: int,
    rate: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.0,
) -> Moments:  # fmt: skip
    """Step number `step`, from 1, of AdamW for the kept weights: (weight, mean, square) after it, new float64 arrays.

        mean   = β₁ mean + (1 − β₁) g      weight = (1 − rate · decay) weight
        square = β₂ square + (1 − β₂) g²            − rate · (mean / (1 − β₁^step)) / (√(square / (1 − β₂^step)) + eps)

    Where mask is False all three are +0 afterwards, whatever they and the gradient, even NaN, were before.
    All arrays are of one shape, mask is bool; gradient is finite where mask is True; arguments stay as they are.
    Raises ValueError for shapes that differ, a kept gradient that is not finite, a step below 1, betas outside [0, 1),
    and unless eps > 0, rate >= 0, weight_decay >= 0, all three finite; TypeError for a mask that is not bool.
    """
    shapes = [x.shape for x in (weight, gradient, mask, mean, square)]
    if len(set(shapes)) > 1:
        raise ValueError(f"weight, gradient, mask, mean and square must have one shape, got {shapes}")
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if not np.isfinite(gradient[mask]).all():
        raise ValueError("gradient must be finite where mask is True, it holds NaN or infinity")
    limited = all(0 <= x < math.inf for x in (rate, weight_decay)) and 0 < eps < math.inf
    if not (limited and step >= 1 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"need step >= 1, betas in [0, 1), finite eps > 0, rate >= 0 and weight_decay >= 0, got "
                         f"{step=}, {betas=}, {eps=}, {rate=}, {weight_decay=}")  # fmt: skip
    weight, gradient, mean, square = (np.where(mask, x, 0).astype(np.float64) for x in (weight, gradient, mean, square))
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    moved = rate * (mean / (1 - betas[0] ** step)) / (np.sqrt(square / (1 - betas[1] ** step)) + eps)
    after = (1 - rate * weight_decay) * weight - moved
    return np.where(mask, after, 0), mean, square


def prune_and_retrain(
    model: Transformer, weights: dict[int, Tensors], method: str, counts: Sequence[int], stream: Tensor, plan: Plan,
    stages: Stages, show: bool = False,
) -> Masks:  # fmt: skip
    """Prune to each of `counts` weights in turn, retraining after each, in place; returns the last masks.

    weights  by step, what `train_first` gives: those at the end, and those that the method starts from
    counts   falling; one of them is one-shot pruning. One threshold for all linear layers of the blocks
    A finished level is kept as a stage; a killed run goes on. Errors as `next_masks` and `train.train`.
    """
    masks = {name: torch.ones(x.weight.shape, dtype=torch.bool) for name, x in surgery.linears(model).items()}
    model.load_state_dict(weights[plan.steps])

    def level(number: int, name: str) -> Tensors:
        start, rates = retraining_rates(method, plan.rates, plan.replayed, plan.constant * plan.rate)
        layers = [model.get_parameter(f"{layer}.weight").numpy(force=True) for layer in masks]
        found = next_masks(layers, [mask.numpy() for mask in masks.values()], counts[number])
        masks.update({layer: torch.from_numpy(mask) for layer, mask in zip(masks, found, strict=True)})
        if start < plan.steps:
            model.load_state_dict(weights[start])
        apply_masks(model, masks)
        settings = replace(plan.again(rates, number), **stages.running(name))
        with progress_bar(settings.steps, show) as progress:
            train.train(model, stream, settings, progress=progress, optimizers=partial(masked_optimizers, masks))
        return copied(model) | {f"mask of {layer}": mask for layer, mask in masks.items()}

    for number in range(len(counts)):
        name = "-".join([method, *map(str, counts[: number + 1])])
        ended = dict(stages.once(name, partial(level, number, name)))
        masks = {layer: ended.pop(f"mask of {layer}") for layer in masks}
        model.load_state_dict(ended)
    return masks


HELP = {
    "method": "how to retrain (default lr). A model does not tell at which rates it was trained, so the schedule is a "
    "cosine over twice --steps, of which the last half is replayed. weight: the model as given is the middle, it is "
    "trained to the end, pruned by what that gives, and rewound. lottery replays all, and needs --rewound",
    "rewound": "for weight and lottery: an earlier step of this model, to rewind to; this one then counts as the end",
}


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run rewinding`."""
    add_options(parser)
    parser.add_argument("--method", choices=METHODS, default="lr", help=HELP["method"])
    parser.add_argument("--rewound", type=Path, metavar="FOLDER", help=HELP["rewound"])
    parser.add_argument("--steps", type=int, default=100, help="of retraining in a round (default 100)")
    parser.add_argument("--rounds", type=int, default=1, help="prune a part, retrain, repeat (default 1: one-shot)")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the schedule (default 0.001)")
    parser.add_argument("--constant", type=float, default=0.01, help="fine-tuning's share of the peak (default 0.01)")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="keep the run here and go on there after a kill")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Prune by one threshold and retrain on the calibration tokens (`--sequences`: few are learned by heart)."""
    checked_sparsity(args.sparsity)
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    stream = tokens.flatten()
    length = min(Plan.length, model.config.context, len(stream))
    plan = Plan(2 * args.steps, args.steps, args.rate, args.constant, args.seed, length=length)
    total = sum(layer.weight.numel() for layer in surgery.linears(model).values())
    counts = [total - dropped(total, sparsity) for sparsity in iterative_sparsities(args.sparsity, args.rounds)]
    weights = rewound_weights(model, args, plan)
    stages = Stages(args.state, f"{plan}\nmodel {checksum(model):08x}, rewound to {args.rewound}\n"
                    f"text {train.fingerprint(stream):08x}\n")  # fmt: skip
    if args.method == "weight" and args.rewound is None:
        weights[plan.steps - plan.replayed] = weights[plan.steps]
        prune_and_retrain(model, weights, "lr", [total], stream, plan, stages, sys.stderr.isatty())  # nothing goes yet
        weights[plan.steps] = copied(model)
    prune_and_retrain(model, weights, args.method, counts, stream, plan, stages, sys.stderr.isatty())
    steps = plan.steps if args.method == "lottery" else plan.replayed
    return report(model, args, "pruning.rewinding") | {"steps of retraining": steps * args.rounds}


def rewound_weights(model: Transformer, args: argparse.Namespace, plan: Plan) -> dict[int, Tensors]:
    """The weights that are known of a model given from outside, by the step that they stand for."""
    weights = {plan.steps: copied(model)}
    if args.rewound is None:
        if args.method == "lottery":
            raise ValueError("--method lottery needs --rewound FOLDER, the model as it was before its training")
        return weights
    if args.method not in ("weight", "lottery"):
        raise ValueError(f"--rewound is for --method weight and lottery, {args.method} rewinds no weights")
    earlier = checkpoint.load(args.rewound).model
    if earlier.config != model.config:
        raise ValueError(f"--rewound {args.rewound} is no earlier step of this model, its sizes are others")
    return weights | dict.fromkeys((0, plan.steps - plan.replayed), copied(earlier))


VARIANTS = {  # in words: the method, and the constant share of fine-tuning
    "lr rewinding": ("lr", 0.01),
    "weight rewinding": ("weight", 0.01),
    "fine-tuning, 1% of the peak rate": ("fine-tuning", 0.01),
    "fine-tuning, 10%": ("fine-tuning", 0.1),
}
LR, WEIGHT, *FINE = VARIANTS
Found = dict[str, dict[float, list[float]]]  # words -> sparsity -> perplexity of each seed
DENSE = "dense, after the first run"
ROLES = ("method", "second", "baseline", "third")  # of the variants
MARGIN = 1.02  # perplexities within 2% count as equal


def perplexity_after(
    lab: Lab, model: Transformer, weights: dict[int, Tensors], method: str, sparsities: Sequence[float], plan: Plan
) -> float:  # fmt: skip
    """What is left of the model after pruning to each of the sparsities in turn, by every fourth sequence."""
    total = sum(layer.weight.numel() for layer in surgery.linears(model).values())
    counts = [total - dropped(total, sparsity) for sparsity in sparsities]
    prune_and_retrain(model, weights, method, counts, lab.train_stream, plan, Stages())
    return evaluate.perplexity(model, lab.validation[::4])


def measure(lab: Lab, plan: Plan, grid: Sequence[float]) -> tuple[Found, dict[str, float]]:
    """Perplexity of every variant, one-shot, for each seed; and, of the first seed, what to compare them with."""
    found: Found = {words: {sparsity: [] for sparsity in grid} for words in VARIANTS}
    others = {}
    for seed in lab.seeds:
        mine = replace(plan, seed=seed)
        model, weights = trained_small(lab, mine)
        after = partial(perplexity_after, lab, model, weights)
        if seed == lab.seeds[0]:
            others[DENSE] = evaluate.perplexity(model, lab.validation[::4])
        for words, (method, constant) in VARIANTS.items():
            for sparsity in grid:
                found[words][sparsity].append(after(method, [sparsity], replace(mine, constant=constant)))
        if lab.full and seed == lab.seeds[0]:
            last = grid[-1]
            others["dense, trained on as long"] = after("lr", [0.0], mine)
            others[f"lottery ticket, {last:.0%}"] = after("lottery", [last], mine)
            others[f"lr rewinding in two rounds, {last:.0%}"] = after("lr", iterative_sparsities(last, 2), mine)
    return found, others


def picture(found: Found, dense: float, plan: Plan) -> Figure:
    """The rates that each method retrains at, and what it ends with by sparsity."""
    drawn, (rates, right) = panels(2, width=9.6, height=3.6)
    shown = {"lottery": ("lottery", 1), "weight, lr": ("lr", 1)} | {words: VARIANTS[words] for words in FINE}
    for (words, (method, constant)), role in zip(shown.items(), ("muted", "method", *ROLES[2:]), strict=True):
        _, values = retraining_rates(method, plan.rates, plan.replayed, constant * plan.rate)
        steps = np.arange(len(values)) + plan.steps - len(values)
        rates.plot(steps, values, **series(role), label=words)[0].set(marker="")
    rates.set(xlabel="step of the schedule that is repeated", ylabel="learning rate", title="retraining")
    rates.set_ylim(0, 1.9 * plan.rate)  # room for the legend
    for (words, heights), role in zip(found.items(), ROLES, strict=True):
        means = [float(np.mean(values)) for values in heights.values()]
        right.plot([100 * sparsity for sparsity in heights], means, **series(role), label=words)
    right.axhline(dense, **series("reference"), label="dense")
    right.set(xlabel="zeros (%)", ylabel="perplexity", yscale="log", title=f"after {plan.replayed} steps")
    right.set_ylim(top=3 * right.get_ylim()[1])
    legend(rates)
    legend(right)
    return drawn


def wins(found: Found) -> dict[str, dict[float, int]]:
    """In how many seeds both rewindings beat each fine-tuning, by sparsity."""
    worse = {s: np.maximum(lr, found[WEIGHT][s]) for s, lr in found[LR].items()}
    return {w: {s: int((worse[s] < np.array(each)).sum()) for s, each in found[w].items()} for w in FINE}


def claim(lab: Lab) -> Claim:
    """Lr rewinding is as good as weight rewinding, both beat fine-tuning; at the most zeros at a larger rate, too."""
    grid, steps = ((0.8, 0.9), 800) if lab.full else ((0.8,), 120)
    plan = Plan(steps, steps // 2)
    found, others = measure(lab, plan, grid)
    means = {words: {s: float(np.mean(values)) for s, values in by.items()} for words, by in found.items()}
    matched, won = [s for s in grid if means[LR][s] <= MARGIN * means[WEIGHT][s]], wins(found)
    beaten = [[s for s, count in by.items() if count == len(lab.seeds)] for by in won.values()]
    ends = "; ".join(f"{s:.0%} zeros: " + ", ".join(f"{by[s]:.1f} {w}" for w, by in means.items()) for s in grid)
    as_good, one, ten = (", ".join(f"{s:.0%}" for s in some) or "none" for some in (matched, *beaten))
    sentence = (
        f"A small model of perplexity {others[DENSE]:.1f} after {steps} steps, pruned at once and retrained for "
        f"{plan.replayed}: {ends}. Lr rewinding is as good as weight rewinding or better at {as_good}. In every seed "
        f"both beat fine-tuning at 1% of the peak, where the paper's rates end, at {one}; and at 10%, at {ten}."
    )
    numbers = {f"perplexity, {words}, {s:.0%}": value for words, by in means.items() for s, value in by.items()}
    numbers |= {f"perplexity, {words}": value for words, value in others.items()}
    numbers |= {f"seeds where both beat {w}, {s:.0%}": count for w, by in won.items() for s, count in by.items()}
    setting = (
        f"half the base model's width, random weights; AdamW, peak {plan.rate}, cosine, {plan.batch} x {plan.length} "
        f"tokens a step; one threshold; the last {plan.replayed} steps replayed on other text; seeds {lab.seeds} draw "
        f"weights and text; within {MARGIN - 1:.0%} counts as equal; dense, lottery and two rounds: the first seed"
    )
    holds = matched == beaten[0] == [*grid] and grid[-1] in beaten[1]
    return Claim(sentence, holds, numbers, picture(found, others[DENSE], plan), setting)
