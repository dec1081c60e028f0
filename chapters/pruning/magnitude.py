"""Magnitude pruning: a weight near zero changes little when it becomes zero, so drop the smallest, and train on.

Three questions are left. How many go is a count, and it is exact here. Compared with which others: those of its layer,
of its row, or of the whole model. And when: all at once, or a few at a time, so that training can move what they did
to the weights that stay. With n weights, sparsity s and d = min(round(s n), n − 1) to drop:

    mask[i] = 0 for the d smallest |w[i]|, of equal ones those of the highest index; 1 for all others
    cubic       s_t = s_f + (s_i − s_f) (1 − (t − t₀) / (t₁ − t₀))³,   between the steps t₀ and t₁
    iterative   s_r = 1 − (1 − s_f)^(r / R):  each of R rounds drops the same share of what is left

Saves    a sparse layer holds a bit for each weight and the values that stay: (1 + b (1 − s)) / b of the bytes.
Costs    quality, and training to win it back; no calibration. Zeros anywhere speed up no dense product.
Papers   Han et al.: Learning both Weights and Connections, 2015, arXiv:1506.02626 (iterative). Zhu and Gupta: To prune,
         or not to prune, 2017, arXiv:1710.01878, section 3 (cubic).
Follows  the counts of SparseML, the cubic schedule of TensorFlow's model optimization (both ends included). Published
         counts differ. Dropping "what is not above sorted[⌊s n⌋]" drops one more (SparseGPT, Wanda's own baseline),
         open_lth does so after rounding up, TensorFlow keeps max(round(n (1 − s)), 1) and all that equals the least.
Symbols  weight, mask `[out, in]`, True where a weight is kept; s sparsity, the share of zeros; t a training step.
Kernel   kernels/pruning/magnitude.py: what `prune_layer` and `prune_rows` compute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.shared.pruned_layers import (
    Masks,
    add_options,
    apply_masks,
    checked_sparsity,
    dropped,
    magnitudes,
    nonzero_masks,
    report,
    train_masked,
)
from minitfm import surgery, train
from minitfm.model import Transformer

SCOPES = ("layer", "row", "global")
Schedule = dict[int, float]  # training step -> sparsity that the weights are brought to before it


def keep_largest(weight: np.ndarray, kept: int) -> np.ndarray:
    """Where the `kept` largest magnitudes of an array stand: a bool mask of its shape with exactly so many True.

    weight has any shape and real dtype, is finite and not empty, and stays as it was. Of equal magnitudes, zeros of
    both signs among them, the lowest flat index (C order) is kept, however many there are. Magnitudes are those of
    `magnitudes`: float64, so none is too small to count, and |-128| of an int8 is 128.
    Raises ValueError as `magnitudes`, and unless 0 <= kept <= weight.size.
    """
    magnitude = magnitudes(weight)
    if not 0 <= kept <= weight.size:
        raise ValueError(f"kept must be from 0 to the {weight.size} weights, got {kept}")
    order = np.argsort(-magnitude, axis=None, kind="stable")  # stable: equals stay in the order of their index
    mask = np.zeros(weight.size, dtype=bool)
    mask[order[:kept]] = True
    return mask.reshape(weight.shape)


def prune_layer(weight: np.ndarray, kept: int) -> np.ndarray:
    """The weight with all but its `kept` largest magnitudes +0, in its shape and dtype. Errors as `keep_largest`."""
    return np.where(keep_largest(weight, kept), weight, weight.dtype.type(0))


def prune_rows(weight: np.ndarray, kept: int) -> np.ndarray:
    """`prune_layer` of each row of a matrix `[out, in]`. A row of zeros keeps its first `kept`, which are zeros."""
    return np.stack([prune_layer(row, kept) for row in weight])


def layer_mask(weight: np.ndarray, sparsity: float) -> np.ndarray:
    """Compared within one layer: exactly `dropped(size, sparsity)` of its weights go, the smallest."""
    return keep_largest(weight, weight.size - dropped(weight.size, sparsity))


def row_mask(weight: np.ndarray, sparsity: float) -> np.ndarray:
    """Compared within one output: of each row of `[out, in]` exactly `dropped(in, sparsity)` weights go."""
    kept = weight.shape[-1] - dropped(weight.shape[-1], sparsity)
    return np.stack([keep_largest(row, kept) for row in weight])


def global_masks(weights: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """Compared over all layers: exactly `dropped(n, sparsity)` of their n weights go, by one threshold.

    weights: arrays of any shapes and dtypes, finite and not empty; returns a bool mask like each. Magnitudes are those
    of `magnitudes`; of equal ones the earlier layer's is kept, within a layer that of the lowest flat index. A layer
    may lose all that it has. Arguments stay as they are.
    Raises ValueError if there are no layers, as `keep_largest`, and unless 0 <= sparsity < 1.
    """
    if not weights:
        raise ValueError("weights must hold at least one layer")
    together = np.concatenate([magnitudes(weight).ravel() for weight in weights])
    masks = np.split(layer_mask(together, sparsity), np.cumsum([weight.size for weight in weights])[:-1])
    return [mask.reshape(weight.shape) for mask, weight in zip(masks, weights, strict=True)]


def cubic_sparsity(
    step: float, begin: float, end: float, initial: float, final: float, power: float = 3.0
) -> float:  # fmt: skip
    """s_t of the first lines: `initial` up to the step `begin`, `final` from `end` on, and fast first in between.

    power 1 is a straight line. Raises ValueError unless begin < end, 0 <= initial <= final < 1, power > 0 and the step
    is a number (NaN is none).
    """
    if not (begin < end and power > 0 and step == step):
        raise ValueError(f"need begin < end, power > 0 and a step, got {begin=}, {end=}, {power=}, {step=}")
    if checked_sparsity(initial) > checked_sparsity(final):
        raise ValueError(f"need initial <= final, got {initial} and {final}")
    left = 1 - min(max((step - begin) / (end - begin), 0), 1)
    return final + (initial - final) * left**power


def iterative_sparsities(final: float, rounds: int) -> list[float]:
    """s_1 .. s_R of the first lines: each round drops the same share of the weights that the last one kept.

    The last is `final` itself, not a rounded power of it. Raises ValueError unless 0 <= final < 1 and rounds >= 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    kept = 1 - checked_sparsity(final)
    return [1 - kept ** (r / rounds) for r in range(1, rounds)] + [final]


def one_shot(sparsity: float, steps: int) -> Schedule:
    """All at once, before the first step."""
    return {0: sparsity}


def gradual(sparsity: float, steps: int, refreshes: int = 20) -> Schedule:
    """The cubic schedule from step 0 to 7/10 of all steps, masks found anew `refreshes` times at equal distances."""
    end = max(1, steps * 7 // 10)
    return {round(end * r / refreshes): cubic_sparsity(r, 0, refreshes, 0.0, sparsity) for r in range(refreshes + 1)}


def iterative(sparsity: float, steps: int, rounds: int = 5) -> Schedule:
    """`rounds` rounds from step 0 to 7/10 of all steps."""
    end = max(1, steps * 7 // 10)
    sparsities = iterative_sparsities(sparsity, rounds)
    return {round(end * r / max(1, rounds - 1)): reached for r, reached in enumerate(sparsities)}


SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {
    "one-shot": one_shot,
    "cubic": gradual,
    "iterative": iterative,
}


def find_masks(model: Transformer, sparsity: float, scope: str = "layer") -> Masks:
    """Masks of all linear layers of the blocks; weights are compared within each layer, each row, or all ("global").

    On CUDA by the kernel, where a weight that is zero already counts as dropped. Raises ValueError for another scope,
    a sparsity outside [0, 1) and weights that are not finite, naming the layer.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    checked_sparsity(sparsity)
    weights = {name: layer.weight.detach() for name, layer in surgery.linears(model).items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{name}.weight must be finite, it holds NaN or infinity")
    if next(iter(weights.values())).is_cuda:
        return dict(zip(weights, kernel_masks(list(weights.values()), sparsity, scope), strict=True))
    arrays = [weight.double().numpy() for weight in weights.values()]
    if scope == "global":
        masks = global_masks(arrays, sparsity)
    else:
        masks = [(layer_mask if scope == "layer" else row_mask)(array, sparsity) for array in arrays]
    return {name: torch.from_numpy(mask) for name, mask in zip(weights, masks, strict=True)}


def kernel_masks(weights: list[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    """What `find_masks` asks of the kernel, CUDA tensors."""
    from kernels.pruning import magnitude as kernel

    def pruned(weight: Tensor) -> Tensor:
        per_row = scope == "row"
        size = weight.shape[1] if per_row else weight.numel()
        return (kernel.prune_rows if per_row else kernel.prune_layer)(weight, size - dropped(size, sparsity)) != 0

    if scope != "global":
        return [pruned(weight.contiguous()) for weight in weights]
    together = pruned(torch.cat([weight.flatten() for weight in weights]))
    parts = together.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def prune_model(model: Transformer, sparsity: float, scope: str = "layer") -> Masks:
    """One shot: zero the smallest weights, in place, no training; returns the masks. Errors as `find_masks`."""
    masks = find_masks(model, sparsity, scope)
    apply_masks(model, masks)
    return masks


def prune_in_training(
    model: Transformer, stream: Tensor, settings: train.Settings, schedule: Schedule, scope: str = "layer"
) -> Masks:
    """Train on a token stream `[T]` and drop by `schedule` on the way, in place; returns the last masks.

    Masks are found from the weights as they are; dropped ones are 0, hence the smallest, and stay dropped. Errors as
    `find_masks` and `train.train`, and ValueError for a schedule past the last step.
    """
    if max(schedule) > settings.steps:
        raise ValueError(f"the schedule ends at step {max(schedule)}, training at {settings.steps}")
    masks = find_masks(model, schedule[0], scope) if 0 in schedule else nonzero_masks(model)

    def after_step(step: int, model: Transformer) -> None:
        if step + 1 in schedule:
            masks.update(find_masks(model, schedule[step + 1], scope))

    train_masked(model, masks, stream, settings, after_step=after_step)
    return masks


BATCH, LENGTH, RATE = 8, 64, 1e-3  # sequences and tokens of a step; peak of AdamW's learning rate


def training(model: Transformer, stream: Tensor, steps: int, seed: int) -> train.Settings:
    """How this chapter trains: AdamW, a cosine to zero."""
    length = min(LENGTH, model.config.context, len(stream))
    return train.Settings(steps, BATCH, length, "adamw", learning_rate=RATE, weight_decay=0.0, seed=seed)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run magnitude`."""
    add_options(parser)
    parser.add_argument("--scope", choices=SCOPES, default="layer", help="what is compared (default layer)")
    parser.add_argument("--steps", type=int, default=0, help="of training, on --sequences sequences (default 0: none)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="cubic", help="when, with --steps (default cubic)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Prune in one shot, or while training on the calibration tokens."""
    if args.steps < 0:
        raise ValueError(f"--steps must not be negative, got {args.steps}")
    checked_sparsity(args.sparsity)
    if args.steps:
        settings = training(model, tokens.flatten(), args.steps, args.seed)
        schedule = SCHEDULES[args.schedule](args.sparsity, args.steps)
        prune_in_training(model, tokens.flatten(), settings, schedule, args.scope)
    else:
        prune_model(model, args.sparsity, args.scope)
    return report(model, args, "pruning.magnitude")


def in_one_shot(lab: Lab, sparsities: Sequence[float]) -> dict[str, list[float]]:
    """Perplexity after one shot without training, by scope, for each sparsity. It draws nothing at random."""
    found: dict[str, list[float]] = {"layer": [], "global": []}
    for scope, perplexities in found.items():
        for sparsity in sparsities:
            model = lab.model()
            prune_model(model, sparsity, scope)
            perplexities.append(lab.perplexity(model))
    return found


def in_training(lab: Lab, sparsity: float, steps: int) -> dict[str, list[float]]:
    """Perplexity after pruning at once and gradually, one for each seed; both train on the same text, equally long."""
    found: dict[str, list[float]] = {"one-shot": [], "cubic": []}
    for name, perplexities in found.items():
        for seed in lab.seeds:
            model = lab.model()
            settings = training(model, lab.train_stream, steps, seed)
            prune_in_training(model, lab.train_stream, settings, SCHEDULES[name](sparsity, steps))
            perplexities.append(lab.perplexity(model))
    return found


def picture(grid: Sequence[float], shot: dict[str, list[float]], trained: dict, base: float, steps: int) -> Figure:
    """The schedules, what each scope costs in one shot, and what each schedule leaves after training."""
    drawn, (when, left, right) = panels(3, width=10.5, height=3.2)
    for name, role in zip(SCHEDULES, ("baseline", "method", "second"), strict=True):
        points = SCHEDULES[name](0.9, steps) | {steps: 0.9}
        line = when.plot([*points], [100 * share for share in points.values()], **series(role), label=name)[0]
        line.set(marker="", drawstyle="steps-post")
    when.set(xlabel="training step", ylabel="zeros (%)", title="when")
    for (scope, values), role in zip(shot.items(), ("baseline", "method"), strict=True):
        left.plot([100 * s for s in grid], values, **series(role), label=scope)
    left.set(xlabel="zeros (%)", ylabel="perplexity", yscale="log", title="one shot, no training")
    for name, role in (("one-shot", "baseline"), ("cubic", "method")):
        heights = [float(np.mean(seeds[name])) for seeds in trained.values()]
        right.plot([100 * s for s in trained], heights, **series(role), label=name)
    right.set(xlabel="zeros (%)", ylabel="perplexity", yscale="log", title=f"{steps} steps of training")
    for axes in (left, right):
        axes.axhline(base, **series("reference"), label="dense")
    for axes in (when, left, right):
        legend(axes)
    return drawn


def claim(lab: Lab) -> Claim:
    """Where nine in ten weights go, dropping them while training costs less than at once; and what scopes cost."""
    grid, steps = ((0.3, 0.5, 0.7), 300) if lab.full else ((0.3, 0.5), 60)
    base, shot = lab.base_perplexity, in_one_shot(lab, grid)
    trained = {sparsity: in_training(lab, sparsity, steps) for sparsity in ((0.8, 0.9) if lab.full else (0.9,))}
    at_once, slowly = (np.array(trained[0.9][name]) for name in ("one-shot", "cubic"))
    wins = [f"{s:.0%}" for s, a, b in zip(grid, shot["global"], shot["layer"], strict=True) if a < b]
    layer, together = (shot[scope][grid.index(0.5)] for scope in ("layer", "global"))
    means = {s: [float(np.mean(found[name])) for name in ("cubic", "one-shot")] for s, found in trained.items()}
    ends = ", and ".join(
        f"{s:.0%} zeros end at {a:.1f} if dropped gradually, {b:.1f} at once" for s, (a, b) in means.items()
    )
    sentence = (
        f"With {steps} steps of training either way {ends} (dense {base:.1f}). Without training 50% zeros end at "
        f"{together:.1f} by one threshold for the model and {layer:.1f} by one for each layer; of {len(grid)} "
        f"sparsities the former is better at {', '.join(wins) or 'none'}."
    )
    numbers = {"perplexity, dense": base, "seeds where gradual is better, 90%": float((slowly < at_once).sum())}
    numbers |= {f"one shot, {scope}, {s:.0%}": v for scope in shot for s, v in zip(grid, shot[scope], strict=True)}
    numbers |= {f"trained, {name}, {s:.0%}": float(np.mean(v)) for s in trained for name, v in trained[s].items()}
    setting = (
        f"block linears; with training a threshold for each layer, AdamW, rate {RATE}, cosine, {BATCH} x {LENGTH} "
        f"tokens a step, dropping ends at 7/10 of the steps; seeds {lab.seeds} draw the text; 60 steps, the quick "
        "budget, are too few to tell schedules apart"
    )
    return Claim(sentence, bool((slowly < at_once).all()), numbers, picture(grid, shot, trained, base, steps), setting)
