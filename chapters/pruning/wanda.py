"""Wanda: a weight counts as much as its input is large, so drop what is small in the product of the two.

An output is Σ_j W_ij x_j. Without W_ij it changes by W_ij x_j, and over calibration text X by |W_ij| · ‖X_j‖₂.
Magnitude pruning takes all inputs to be equally large. In large language models a few are far larger than the rest, and
a small weight on one of them does more than a large weight elsewhere.

    score[i, j] = |W[i, j]| · ‖X_j‖₂,      ‖X_j‖₂² = Σ of X_j² over the tokens of a sample, averaged over the samples
    mask[i, j]  = 0 for the d lowest scores of row i, d = min(round(s · in), in − 1), of equal ones the last;
                  with n:m for the m − n lowest of every m neighbours

Compared within an output, every output loses the same share, and a factor on a row or on all norms changes nothing.
Nor does what a norm's gain and the weights that read it can trade: (W / s)(s x) has the same scores as W x.

Saves    what zeros save: see chapters/pruning/magnitude.py, and for N:M chapters/sparsity/n_m.py.
Costs    a pass over calibration text for each block; one number for each input. No Hessian, no gradient, no training,
         and the weights that stay are not changed.
Paper    Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models, 2023,
         arXiv:2306.11695, section 3; the variant is that of the appendix and the release.
Follows  the authors' release: blocks in order, all layers of a block see what reaches them while it is dense, the next
         block sees what the pruned ones make. It drops ⌊s · in⌋ of a row; here counts are rounded, as in all pruning
         chapters, so that 0.29 · 100, which is below 29 in floats, is 29. N:M says what is KEPT, there what goes.
Symbols  W, score, mask `[out, in]`, mask True where a weight is kept; norms `[in]`; n of m neighbours along the inputs.
Kernel   kernels/pruning/wanda.py: `prune_rows` and `prune_groups`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.pruning.magnitude import keep_largest, row_mask
from chapters.pruning.magnitude import prune_model as prune_by_magnitude
from chapters.shared.pruned_layers import Masks, add_options, apply_masks, checked_sparsity, dropped, prune_each, report
from chapters.sparsity.n_m import n_m_mask
from minitfm import surgery
from minitfm.model import Transformer

Choose = Callable[[Tensor, Tensor], Tensor]  # weight [out, in], norms float64 [in] -> bool mask [out, in]
NEAR = 0.001  # of a share: what the variant's search is content with


def input_norms(batches: Iterable[np.ndarray]) -> np.ndarray:
    """‖X_j‖₂ of the first lines for each input channel: float64 `[in]`, from batches of calibration inputs.

    A batch is `[samples, tokens, in]`, or `[tokens, in]`, which is one sample; samples may differ in length, and how
    they are put into batches changes nothing. Squares are added up over a sample's tokens and averaged over samples;
    the root is taken at the end. Sums are float64, whatever the dtype of a batch, and no batch is held or changed.
    Raises ValueError for no token at all and for inputs that are not finite. Source: layerwrapper.py, add_batch.
    """
    total, samples, tokens = 0.0, 0, 0
    for batch in batches:
        x = np.asarray(batch, dtype=np.float64).reshape(-1, batch.shape[-1])  # [tokens, in]
        samples, tokens = samples + (len(batch) if batch.ndim == 3 else 1), tokens + len(x)
        total = total + (x**2).sum(axis=0)
    if tokens == 0 or not np.isfinite(total).all():
        raise ValueError(f"batches must hold finite numbers and at least one token, got {tokens} tokens")
    return np.sqrt(total / samples)


def scores(weight: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """|W_ij| · ‖X_j‖₂ for weight `[out, in]` and norms `[in]`, `[out, in]`; both stay as they were.

    Multiplied in the common dtype of the two, but float32 at least: float16 weights and float32 norms give the float32
    scores that the kernel orders by, bit for bit.
    Raises ValueError for shapes that do not fit or are empty, for norms that are negative, and for weights, norms or
    products that are not finite.
    """
    if weight.ndim != 2 or weight.size == 0 or norms.shape != weight.shape[1:]:
        raise ValueError(f"need weight [out, in], not empty, and norms [in], got {weight.shape} and {norms.shape}")
    if not np.isfinite(weight).all():
        raise ValueError("weight must be finite, it holds NaN or infinity")
    if not (np.isfinite(norms) & (norms >= 0)).all():
        raise ValueError("norms must be finite and not negative")
    wide = np.result_type(weight, norms, np.float32)
    with np.errstate(over="ignore"):
        found = np.abs(weight.astype(wide)) * norms.astype(wide)
    if not np.isfinite(found).all():
        raise ValueError(f"weight times norms must be finite, but it exceeds what {wide} can hold")
    return found


def prune_rows(weight: np.ndarray, norms: np.ndarray, kept: int) -> np.ndarray:
    """The weight with all but the `kept` highest scores of each row +0; of equal scores the first stay."""
    mask = np.stack([keep_largest(row, kept) for row in scores(weight, norms)])
    return np.where(mask, weight, weight.dtype.type(0))


def prune_groups(weight: np.ndarray, norms: np.ndarray, n: int = 2, m: int = 4) -> np.ndarray:
    """The weight with all but the n highest scores of every m neighbours +0; of equal scores the first stay."""
    return np.where(n_m_mask(scores(weight, norms), n, m), weight, weight.dtype.type(0))


def cut_mask(score: np.ndarray, alpha: float) -> np.ndarray:
    """Drop the lowest scores of each row, and what equals them, while their sum is at most alpha times the row's."""
    ordered = np.sort(score, axis=1)
    count = (np.cumsum(ordered, axis=1) <= alpha * score.sum(axis=1, keepdims=True)).sum(axis=1)
    cut = np.take_along_axis(ordered, np.maximum(count - 1, 0)[:, None], axis=1)  # [out, 1], the last that goes
    return (score > cut) | (count == 0)[:, None]


def variant_mask(score: np.ndarray, sparsity: float) -> np.ndarray:
    """The release's variant: each row gives up the same share alpha of its score, hence not of its weights.

    score `[out, in]`, at least 0; returns a bool mask, True where a weight is kept. alpha starts at 0.4 in the interval
    from 0 to 0.8. While the share of zeros that `cut_mask` of alpha makes is more than 0.001 from `sparsity` and the
    interval at least 0.001 long, alpha becomes the end of it that lies beyond the answer, the upper if there are too
    many zeros, and the next alpha is the middle. So the share is near, not exact, and one that no alpha up to 0.8 makes
    is not reached. A row of zeros loses all. A row whose lowest score is too much loses none.
    Raises ValueError unless 0 <= sparsity < 1. Source: prune.py, return_given_alpha and prune_wanda.
    """
    checked_sparsity(sparsity)
    low, alpha, high = 0.0, 0.4, 0.8
    mask = cut_mask(score, alpha)
    while abs((zeros := 1 - mask.mean()) - sparsity) > NEAR and high - low >= NEAR:
        low, high = (low, alpha) if zeros > sparsity else (alpha, high)
        alpha = (low + high) / 2
        mask = cut_mask(score, alpha)
    return mask


def find_mask(
    weight: Tensor, norms: Tensor, sparsity: float, pattern: tuple[int, int] | None = None, variant: bool = False
) -> Tensor:
    """The mask of one layer: n of every m neighbours stay with `pattern` (n, m), else a share of each row goes.

    weight `[out, in]`, norms float64 `[in]`. By the reference in float64; on CUDA by the kernel in float32, where a
    weight that is zero already counts as dropped. Errors as the reference, and ValueError for a variant of a pattern.
    """
    if variant and pattern:
        raise ValueError(f"the variant compares rows, it knows no pattern such as {pattern[0]}:{pattern[1]}")
    if weight.is_cuda and not variant:
        from kernels.pruning import wanda as kernel

        if pattern:
            return kernel.prune_groups(weight, norms.float(), *pattern) != 0
        return kernel.prune_rows(weight, norms.float(), weight.shape[1] - dropped(weight.shape[1], sparsity)) != 0
    score = scores(weight.double().numpy(force=True), norms.numpy(force=True))
    if pattern:
        return torch.from_numpy(n_m_mask(score, *pattern))
    return torch.from_numpy((variant_mask if variant else row_mask)(score, sparsity))


def recorded_norms(model: Transformer, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """`input_norms` of what reaches the named layers, by name; no more than a batch of it is ever held."""
    totals: dict[str, Tensor] = {}
    for name, x in surgery.record_inputs(model, tokens, names):
        totals[name] = totals.get(name, 0) + x.double().square().sum(dim=(0, 1))
    return {name: (total / len(tokens)).sqrt() for name, total in totals.items()}


def prune_model(model: Transformer, tokens: Tensor, choose: Choose) -> Masks:
    """Zero what `choose(weight, norms)` does not keep in the linear layers of the blocks, in place; returns the masks.

    tokens `[N, T]` are calibration text. Blocks in order: all layers of a block are given the norms of what reaches
    them while it is dense and those before it are pruned, then it is pruned, all of it.
    Raises ValueError, naming the layer, for weights and inputs that are not finite, before its block is changed.
    """
    layers, masks = surgery.linears(model), {}
    for _, names in groupby(layers, lambda name: name.split(".")[1]):
        found = {}
        for name, norms in recorded_norms(model, tokens, list(names)).items():
            weight = layers[name].weight.detach()
            if not (weight.isfinite().all() and norms.isfinite().all()):
                raise ValueError(f"{name}: the weight and what reaches it must be finite, there is NaN or infinity")
            found[name] = choose(weight, norms)
        apply_masks(model, found)
        masks |= found
    return masks


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run wanda`."""
    add_options(parser, patterns=True)
    parser.add_argument("--variant", action="store_true", help="each row gives up the same share of its score instead")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Prune by the calibration tokens as `options` asked."""
    checked_sparsity(args.sparsity)
    chosen = {"sparsity": args.sparsity, "pattern": args.pattern, "variant": args.variant}
    prune_model(model, tokens, partial(find_mask, **chosen))
    return report(model, args, "pruning.wanda")


CHANNELS, FACTOR = 4, 16.0  # planted: of every block norm, so many times as large
RULES: dict[str, tuple[float, tuple[int, int] | None]] = {
    "30%": (0.3, None), "50%": (0.5, None), "4:8": (0.5, (4, 8)), "2:4": (0.5, (2, 4)), "70%": (0.7, None),
}  # fmt: skip
HALVES = ("50%", "2:4")  # what the claim is about
MODELS = {False: "base model", True: "planted outliers"}


def pruned(lab: Lab, method: str, rule: str, planted: bool, seed: int) -> Transformer:
    """A pruned model; a seed draws calibration text and the channels that are planted."""
    model, (sparsity, pattern) = lab.model(), RULES[rule]
    if planted:
        surgery.plant_outliers(model, min(CHANNELS, lab.config.dim), FACTOR, seed)
    if method == "Wanda":
        tokens = lab.calibration(seed, 128 if lab.full else 32)
        prune_model(model, tokens, partial(find_mask, sparsity=sparsity, pattern=pattern))
    elif pattern:
        prune_each(model, partial(n_m_mask, n=pattern[0], m=pattern[1]))
    else:
        prune_by_magnitude(model, sparsity, "row" if method == "magnitude, by row" else "layer")
    return model


def perplexities(lab: Lab, method: str, rule: str, planted: bool) -> np.ndarray:
    """One for each seed; where nothing is drawn, one for all."""
    drawn = planted or method == "Wanda"
    found = [lab.perplexity(pruned(lab, method, rule, planted, seed)) for seed in (lab.seeds if drawn else [0])]
    return np.resize(found, len(lab.seeds))


def input_sizes(lab: Lab, planted: bool) -> dict[str, np.ndarray]:
    """Norms of the inputs of each layer, largest first, their mean = 1."""
    model = lab.model()
    if planted:
        surgery.plant_outliers(model, min(CHANNELS, lab.config.dim), FACTOR)
    found = recorded_norms(model, lab.calibration(0, 8), list(surgery.linears(model))).items()
    return {name: np.sort((x / x.mean().clamp_min(1e-30)).numpy(force=True))[::-1] for name, x in found}


def picture(lab: Lab, means: dict[tuple[str, str, bool], float], sizes: dict[str, np.ndarray]) -> Figure:
    """How unequal the inputs of three layers are, and what pruning costs."""
    drawn, (left, right) = panels(2, width=8.6, height=3.2)
    first, most = next(iter(sizes)), max(sizes, key=lambda name: sizes[name][0])
    curves = {"first layer": sizes[first], "most unequal layer": sizes[most]}
    curves["first layer, planted"] = input_sizes(lab, True)[first]
    for (words, values), role in zip(curves.items(), ("baseline", "method", "third"), strict=True):
        left.plot(np.linspace(0, 100, len(values)), values, **series(role), label=words)[0].set(marker="")
    left.set(xlabel="input channels, sorted (%)", ylabel="norm, mean = 1", yscale="log", title="inputs")
    left.set_ylim(bottom=1e-2)  # some channels are hardly ever there
    lines = {("magnitude", False): "baseline", ("magnitude", True): "third", ("Wanda", False): "method"}
    for (method, planted), role in lines.items():
        points = {rule: means[method, rule, planted] for rule in RULES if (method, rule, planted) in means}
        line = right.plot([*points], [*points.values()], **series(role), label=f"{method}, {MODELS[planted]}")[0]
        line.set(linestyle="")  # between two rules there is nothing
    right.axhline(lab.base_perplexity, **series("reference"), label="dense")
    right.set(xlabel="zeros, or n:m kept", ylabel="perplexity", yscale="log", title="after pruning")
    legend(left)
    legend(right, fontsize=8)
    return drawn


def named(means: dict[tuple[str, str, bool], float], wins: dict[tuple[str, bool], np.ndarray]) -> dict[str, float]:
    """What was measured, in words."""
    found = {f"{method}, {rule}, {MODELS[planted]}": mean for (method, rule, planted), mean in means.items()}
    return found | {f"seeds where Wanda is better, {r}, {MODELS[o]}": float(won.sum()) for (r, o), won in wins.items()}


def claim(lab: Lab) -> Claim:
    """Half of the weights dropped, free or 2:4, cost less by Wanda's score than by magnitude."""
    measured = [(rule, False) for rule in (RULES if lab.full else HALVES)] + [(rule, True) for rule in HALVES]
    asked = [(method, *pair) for pair in measured for method in ("magnitude", "Wanda")]
    found = {key: perplexities(lab, *key) for key in [*asked, ("magnitude, by row", "50%", False)]}
    means = {key: float(values.mean()) for key, values in found.items()}
    wins = {pair: found["Wanda", *pair] < found["magnitude", *pair] for pair in measured}
    holds = all(wins[rule, False].all() for rule in HALVES)
    always = [rule for rule, planted in measured if not planted and wins[rule, False].all()]
    sizes = input_sizes(lab, False)
    pairs = {key: f"{means['Wanda', *key]:.1f} against {means['magnitude', *key]:.1f}" for key in wins}
    sentence = (
        f"Half of the weights dropped by Wanda's score {'cost' if holds else 'do not always cost'} less than by "
        f"magnitude: perplexity {pairs['50%', False]} where any may go, {pairs['2:4', False]} in the 2:4 pattern "
        f"(dense {lab.base_perplexity:.1f}), and with planted outlier channels {pairs['50%', True]} and "
        f"{pairs['2:4', True]}; without them it is better for every seed in {len(always)} of "
        f"{len(measured) - len(HALVES)} settings ({', '.join(always) or 'none'})."
    )
    largest = max(values[0] for values in sizes.values())
    numbers = {"perplexity, dense": lab.base_perplexity, "largest norm of an input, mean of its layer = 1": largest}
    numbers |= named(means, wins)
    setting = (
        f"all block linears, one shot, no training; calibration {128 if lab.full else 32} sequences; magnitude "
        f"compares within a layer unless said; planted: {CHANNELS} channels of every block norm × {FACTOR:g}, same "
        f"function; seeds {lab.seeds} draw calibration text and planted channels"
    )
    return Claim(sentence, holds, numbers, picture(lab, means, sizes), setting)
