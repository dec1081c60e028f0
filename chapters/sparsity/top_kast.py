"""Top-KAST: multiply by the largest weights only, train these and the next largest, and choose again every few steps.

A static mask has to be right before anything is learned. Growing one by the dense gradient costs what sparsity saves.
Between them: some weights that are zero in the product get a gradient all the same, and one that grows enough enters.

    A  the forward set,  the |A| largest |θ| of a layer: what it multiplies by, density D = |A| / all
    B  the backward set, the |B| largest, A and M more:  what gets a gradient and moments; the rest stands still
    penalty = ½ Σ_A θ² + ½ Σ_{B∖A} θ² / D               and so decay λ θ on A, λ θ / D on B∖A

A weight of B∖A gets the gradient with respect to its zero in the product. It decays 1/D times as fast as one of A, so
only a gradient that keeps its direction carries it into A. Chosen anew every few steps; exploration stops in the end,
and B becomes A.

Saves    gradients and both moments, 12 bytes in float32, are kept for B alone, and A is all that inference needs.
         Each weight of B costs 5 bytes more while training: its place and whether it is in A.
Costs    θ itself stays dense: training needs the weights that are in neither set when it chooses. The paper keeps it
         on the host; here it is a buffer. One layer's product at a time expands its weight, and the gradient passes
         through tiles of rows, of which B is kept: the multiplications are dense. See chapters/shared/subset_layers.py.
Paper    Jayakumar et al.: Top-KAST: Top-K always sparse training, 2020, arXiv:2106.03517, sections 2 and 3.
Follows  SparseML for the penalty as decay, decoupled from Adam's moments, which would divide the 1/D out again. The
         paper's formula prints |θ| and its text says L2: squared, the gradient is θ, and the ratio 1/D is exact.
Symbols  weight, theta `[out, in]`; index `[b]` flat places of B, ascending; values, active `[b]` its weights, and
         whether they are in A; mean, square `[b]` the moments; x `[tokens, in]`.
Kernel   kernels/sparsity/top_kast.py: what `choose_sets` and `sparse_update` compute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from chapters.shared import equal_weights
from chapters.shared.equal_weights import DENSE, STATIC
from chapters.shared.pruned_layers import add_options, checked_sparsity, dropped, magnitudes, report
from chapters.shared.subset_layers import SubsetLinear, SubsetOptimizer, kept_bytes, settle
from minitfm import surgery, train
from minitfm.model import Transformer

FIRST, SECOND, EPSILON = 0.9, 0.95, 1e-8  # of Adam, as `train.make_optimizers` has them


def choose_sets(weight: np.ndarray, forward: int, backward: int) -> np.ndarray:
    """In how many of the two sets each weight is: 2 in A and so in B, 1 in B alone, 0 in neither; uint8, its shape.

    A holds exactly the `forward` largest magnitudes, B exactly the `backward` largest. Of equal magnitudes, zeros of
    both signs among them, the lowest flat index (C order) comes first, in both: A lies in B.
    weight has any shape and real dtype, is finite and not empty, and stays as it was; magnitudes are compared in
    float64. Raises ValueError as `magnitudes`, and unless 1 <= forward <= backward <= weight.size.
    """
    if not 1 <= forward <= backward <= weight.size:
        raise ValueError(f"need 1 <= forward <= backward <= {weight.size} weights, got {forward} and {backward}")
    order = np.argsort(-magnitudes(weight), axis=None, kind="stable")  # stable: equals stay in the order of their index
    member = np.zeros(weight.size, dtype=np.uint8)
    member[order[:backward]] = 1
    member[order[:forward]] = 2
    return member.reshape(weight.shape)


def checked_density(density: float) -> float:
    """`density`, D of the first lines, as it is. Raises ValueError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    return density


def exploration_penalty(values: np.ndarray, active: np.ndarray, density: float) -> tuple[float, np.ndarray]:
    """The penalty of the first lines, and its gradient float64 `[b]`: θ on A, θ / D on the rest of B.

    values `[b]` are the weights of B, active `[b]` bool says which are in A, density is D; computed in float64.
    Raises ValueError for other shapes, values that are not finite, and unless 0 < density <= 1.
    """
    if values.shape != active.shape or not np.isfinite(values).all():
        raise ValueError(f"values must be finite and shaped as active {active.shape}, got shape {values.shape}")
    gradient = np.where(active, 1.0, 1 / checked_density(density)) * values.astype(np.float64)
    return float(0.5 * (gradient * values).sum()), gradient


def sparse_update(
    values: np.ndarray, gradient: np.ndarray, active: np.ndarray, mean: np.ndarray, square: np.ndarray,
    step: int, rate: float, decay: float, density: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """One step of Adam on the weights of B, with the penalty's gradient as decoupled decay: new (values, mean, square).

        mean'   = β₁ mean + (1 − β₁) gradient               β₁ = FIRST
        square' = β₂ square + (1 − β₂) gradient²            β₂ = SECOND
        values' = values − rate · (m / (√s + EPSILON) + decay · values · (1 on A, 1 / density elsewhere))

    with m = mean' / (1 − β₁^step) and s = square' / (1 − β₂^step). All arrays are `[b]` and stay as they were; float64
    is returned. step counts from 1 and is the run's, also for a weight that is new in B and has moments of 0.
    Raises ValueError for other shapes, step < 1, and unless 0 < density <= 1.
    """
    shapes = {array.shape for array in (values, gradient, active, mean, square)}
    if len(shapes) != 1 or step < 1:
        raise ValueError(f"arrays must share a shape and step be at least 1, got {sorted(shapes)} and step={step}")
    values, gradient, mean, square = (array.astype(np.float64) for array in (values, gradient, mean, square))
    scale = np.where(active, 1.0, 1 / checked_density(density))
    mean = FIRST * mean + (1 - FIRST) * gradient
    square = SECOND * square + (1 - SECOND) * gradient**2
    size = np.sqrt(square / (1 - SECOND**step)) + EPSILON
    return values - rate * (mean / (1 - FIRST**step) / size + decay * scale * values), mean, square


def refresh(
    theta: np.ndarray, index: np.ndarray, values: np.ndarray, moments: np.ndarray,
    choose: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Write B back into θ, choose again, and take out the new B: (theta, index, values, active, moments).

    theta `[out, in]`, of which only the places outside B are up to date; index int64 `[b]` the flat places of B,
    ascending, values `[b]` its weights, moments `[k, b]` k numbers of the optimizer for each. choose(theta) gives what
    `choose_sets` does. Returned are θ with the values in place; the new B's index (int64, ascending), values and
    active, bool, where it is in A; and moments `[k, b']`: as they were for a weight that stays in B, 0 for a new one.
    B may change its size. Arguments stay as they were; θ, values and moments keep their dtypes. Raises ValueError
    unless index, values and moments have one length, and index rises strictly within theta.
    """
    inside = index.size == 0 or (index[0] >= 0 and index[-1] < theta.size and (np.diff(index) > 0).all())
    if not inside or not index.shape == values.shape == moments.shape[1:]:
        raise ValueError(f"index must rise within {theta.size} weights, one for each of values {values.shape}")
    theta = theta.copy()
    theta.reshape(-1)[index] = values
    member = choose(theta).reshape(-1)
    chosen = np.flatnonzero(member)
    place = np.searchsorted(index, chosen)
    stays = np.append(index, -1)[place] == chosen  # past the last: no place at all
    carried = np.where(stays, np.pad(moments, ((0, 0), (0, 1)))[:, place], 0).astype(moments.dtype)
    return theta, chosen, theta.reshape(-1)[chosen], member[chosen] == 2, carried


def chosen_sets(theta: Tensor, forward: int, backward: int) -> Tensor:
    """`choose_sets` of a tensor; on CUDA by the kernel."""
    if not theta.is_cuda:
        return torch.from_numpy(choose_sets(theta.double().numpy(), forward, backward))
    from kernels.sparsity import top_kast as kernel

    return kernel.choose_sets(theta, forward, backward)


def update_in_place(layer: SubsetLinear, state: dict[str, Any], rate: float, decay: float) -> None:
    """`sparse_update` of one layer; on CUDA by the kernel."""
    values, gradient, (mean, square) = layer.values, layer.values.grad, (state["mean"], state["square"])
    assert gradient is not None, "SubsetOptimizer updates no layer without one"
    step: int = state["step"]
    if values.is_cuda:
        from kernels.sparsity import top_kast as kernel

        asked = gradient, layer.active, mean, square, step, rate, decay, layer.density
        kernel.sparse_update(values, *asked, out=(values, mean, square))
        return
    slope = gradient.to(mean.dtype)
    mean.lerp_(slope, 1 - FIRST)
    square.mul_(SECOND).addcmul_(slope, slope, value=1 - SECOND)
    size = (square / (1 - SECOND**step)).sqrt_().add_(EPSILON)
    values.sub_(values.where(layer.active, values / layer.density), alpha=rate * decay)
    values.addcdiv_(mean, size, value=-rate / (1 - FIRST**step))


@dataclass(frozen=True)
class Plan:
    """How a model is trained by Top-KAST: `sparsity` is the share of weights outside A, `extra` that of B beyond A.

    Sets are chosen `every` so many steps; after `stop`, a share of all steps, B is A and both stay. decay is λ.
    Raises ValueError for what makes no sense.
    """

    sparsity: float
    extra: float = 0.2
    every: int = 10
    decay: float = 1.0
    stop: float = 0.8

    def __post_init__(self) -> None:
        checked_sparsity(self.sparsity)
        if not (0 <= self.extra <= 1 and 0 <= self.stop <= 1 and 0 <= self.decay < np.inf and self.every >= 1):
            raise ValueError(f"need extra and stop in [0, 1], a finite decay >= 0 and every >= 1, got {self}")

    def counts(self, size: int, exploring: bool) -> tuple[int, int]:
        """(|A|, |B|) of a layer of `size` weights; B is A where exploration has stopped."""
        forward = size - dropped(size, self.sparsity)
        return forward, min(size, forward + exploring * round(self.extra * size))


def prepare(model: Transformer, plan: Plan) -> list[SubsetLinear]:
    """Put a `SubsetLinear` in the place of every block linear, in place. ValueError names the layer with NaN in it."""
    layers = surgery.linears(model)
    for name, layer in layers.items():
        if not layer.weight.isfinite().all():
            raise ValueError(f"{name}.weight must be finite, it holds NaN or infinity")
    made = [
        SubsetLinear(layer, *plan.counts(layer.weight.numel(), plan.stop > 0), chosen_sets) for layer in layers.values()
    ]
    for name, layer in zip(layers, made, strict=True):
        surgery.replace(model, name, layer)
    return made


def optimizers(model: Transformer, layers: list[SubsetLinear], rate: float, decay: float) -> list[Any]:
    """`SubsetOptimizer` for the layers, AdamW without decay for what else requires a gradient."""
    own = {id(layer.values) for layer in layers}
    rest = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in own]
    dense = torch.optim.AdamW([{"params": rest, "peak": rate}], lr=rate, betas=(FIRST, SECOND), weight_decay=0.0)
    return [SubsetOptimizer(layers, update_in_place, rate, decay), dense]


def train_top_kast(model: Transformer, stream: Tensor, settings: train.Settings, plan: Plan) -> list[tuple[int, float]]:
    """Train on a token stream `[T]` and leave the weights of A, in place: [(step, share of A that is new in it), ..].

    The penalty replaces `settings.weight_decay`. Errors as `Plan`, `prepare` and `train.train`.
    """
    layers = prepare(model, plan)
    made = optimizers(model, layers, settings.learning_rate, plan.decay)
    last, changes = round(plan.stop * settings.steps), []

    def after_step(step: int, model: Transformer) -> None:
        done = step + 1
        if done == last or (done < last and done % plan.every == 0):
            sizes = {layer: plan.counts(layer.theta.numel(), done < last)[1] for layer in layers}
            changes.append((done, made[0].refresh(sizes)))

    train.train(model, stream, settings, after_step=after_step, optimizers=lambda model, settings: made)
    settle(model)
    return changes


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run top_kast`."""
    add_options(parser)
    parser.add_argument("--steps", type=int, default=200, help="of training, on --sequences sequences (default 200)")
    parser.add_argument("--extra", type=float, default=0.2, help="share of the weights in B beyond A (default 0.2)")
    parser.add_argument("--every", type=int, default=10, help="steps between refreshes (default 10)")
    parser.add_argument("--decay", type=float, default=1.0, help="of a weight in A (default 1)")
    parser.add_argument("--stop", type=float, default=0.8, help="share of steps that explore (default 0.8)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Train a dense model on by Top-KAST, on the calibration tokens."""
    plan = Plan(args.sparsity, args.extra, args.every, args.decay, args.stop)
    stream, length = tokens.flatten(), min(equal_weights.LENGTH, model.config.context, tokens.numel())
    settings = train.Settings(args.steps, equal_weights.BATCH, length, "adamw", learning_rate=1e-3, seed=args.seed)
    train_top_kast(model, stream, settings, plan)
    return report(model, args, "sparsity.top_kast")


TOP, DECAY = "Top-KAST", 1.0
SETTING = (
    f"half the base's width from random weights, {{steps}} steps of {equal_weights.BATCH} x {equal_weights.LENGTH} "
    f"tokens, AdamW, rate {equal_weights.RATE}, decay {DECAY:g} for all; B is 20% of the weights larger than A, chosen "
    "every 10 steps, exploration stops at 8/10; narrow and shallow have a quarter of the block weights; the quick "
    "budget, 40 steps, is too short to tell them apart; seeds {seeds}"
)


def top_kast(
    lab: Lab, sparsity: float, steps: int, seed: int, schedule: str = "cosine", stop: float = 0.8
) -> tuple[Transformer, list[tuple[int, float]]]:
    """A model of half the base's width, trained from random weights, and how its A changed."""

    def make() -> tuple[Transformer, list[tuple[int, float]]]:
        model = equal_weights.fresh(equal_weights.half(lab.config), seed)
        settings = equal_weights.recipe(lab, steps, seed, DECAY, schedule)
        changes = train_top_kast(model, lab.train_stream, settings, Plan(sparsity, decay=DECAY, stop=stop))
        return model.eval(), changes

    return lab.once(("top_kast", sparsity, steps, seed, schedule, stop), make)


def memory(lab: Lab, extras: Sequence[float]) -> dict[float, float]:
    """Share of the weights in B, and bytes of gradients and moments that are kept for each weight of the layers."""
    config, found = equal_weights.half(lab.config), {}
    for extra in extras:
        model = equal_weights.fresh(config, 0)
        sparse, _ = optimizers(model, prepare(model, Plan(0.75, extra)), 1e-3, 0.0)
        train.next_token_loss(model, lab.train_stream[None, :8]).backward()
        sparse.step()
        weights = equal_weights.block_weights(config)
        found[sum(len(layer.index) for layer in sparse.layers) / weights] = kept_bytes(model, sparse) / weights
    return found


def picture(curves: dict[str, list[tuple[int, float]]], bars: dict[str, float], held: dict[float, float]) -> Figure:
    """How A settles, what models of equally many weights reach, and what training keeps."""
    drawn, (left, middle, right) = panels(3, width=12, height=3.2)
    for (words, points), role in zip(curves.items(), ("method", "baseline"), strict=True):
        left.plot([step for step, _ in points], [100 * new for _, new in points], **series(role), label=words)
    left.set(xlabel="training step", ylabel="new in A at a refresh (%)", title="the masks", ylim=(0, None))
    middle.barh([*bars], [*bars.values()], color=[COLOURS["method" if TOP in name else "muted"] for name in bars])
    middle.invert_yaxis()
    middle.set(xlabel="perplexity", title="equally many weights")
    right.plot([100 * share for share in held], [*held.values()], **series("method"), label=TOP)
    right.axhline(12, **series("reference"), label="dense")
    right.set(xlabel="weights in B (%)", ylabel="bytes per weight", title="gradient and moments", ylim=(0, None))
    for axes in (left, right):
        legend(axes)
    return drawn


def in_words(bars: dict[str, float], ahead: dict[str, int], moved: Sequence[float], steps: int, seeds: int) -> str:
    """The claim's sentence."""
    rivals = {
        share: ", ".join(
            f"{name} {bars[f'{name}, {share}']:.0f}" for name in (*STATIC, *DENSE) if f"{name}, {share}" in bars
        )
        for share in ("10%", "25%")
    }
    wins = "; ".join(f"{name} {count}" for name, count in ahead.items())
    settles = "the masks settle by themselves" if moved[2] < moved[0] / 2 else "it is the rate that settles the masks"
    return (
        f"After {steps} steps from random weights Top-KAST with 10% of the block weights reaches perplexity "
        f"{bars[f'{TOP}, 10%']:.0f} ({rivals['10%']}), with 25% {bars[f'{TOP}, 25%']:.0f} ({rivals['25%']}); seeds of "
        f"{seeds} in which it is better: {wins}. Of A {moved[0]:.1%} is new at a refresh at most, {moved[1]:.1%} when "
        f"exploration stops, {moved[2]:.1%} if the rate does not fall: {settles}. Gradients and moments grow in "
        "proportion to B."
    )


def claim(lab: Lab) -> Claim:
    """Against static masks, and smaller dense models, that hold as many weights; whether its masks settle; memory."""
    steps, rivals = (300, STATIC + DENSE) if lab.full else (40, DENSE)
    bars, ahead = {}, {}
    for sparsity, names in ((0.9, STATIC), (0.75, rivals)):
        method = partial(top_kast, lab, sparsity, steps)
        found = equal_weights.race(lab, lambda seed, method=method: method(seed)[0], names, sparsity, steps, DECAY)
        mine, share = found.pop("method"), f"{1 - sparsity:.0%}"
        bars |= {f"{name}, {share}": float(np.mean(values)) for name, values in {TOP: mine, **found}.items()}
        ahead |= {f"{n}, {share}": sum(a < b for a, b in zip(mine, v, strict=True)) for n, v in found.items()}
    curves = {
        "rate falls": top_kast(lab, 0.9, steps, 0)[1],
        "rate stays": top_kast(lab, 0.9, steps, 0, "constant", 1.0)[1],
    }
    new = {words: [share for _, share in points] for words, points in curves.items()}
    moved = [max(new["rate falls"]), float(np.mean(new["rate falls"][-3:])), float(np.mean(new["rate stays"][-4:-1]))]
    held = memory(lab, (0.0, 0.25, 0.5, 0.75))
    numbers = {f"perplexity, {name}": value for name, value in bars.items()}
    numbers |= {f"seeds where it is better than {name}": float(count) for name, count in ahead.items()}
    numbers |= dict(zip(("new in A, at most", "new in A at the stop", "new in A, rate stays"), moved, strict=True))
    numbers |= {f"bytes of gradient and moments per weight, B {share:.0%}": value for share, value in held.items()}
    grows = all(abs(value - 12 * share) < 0.1 for share, value in held.items())
    holds = all(count == len(lab.seeds) for count in ahead.values()) and moved[1] < moved[0] / 2 and grows
    sentence = in_words(bars, ahead, moved, steps, len(lab.seeds))
    return Claim(sentence, holds, numbers, picture(curves, bars, held), SETTING.format(steps=steps, seeds=lab.seeds))
