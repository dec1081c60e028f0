"""AWQ: protect the weights that meet large inputs, by scaling them up before rounding and their inputs down.

A few input channels are much larger than the others, and an error in a weight is multiplied by its input. Rounding
moves every weight of a group by up to half a step of their common grid, be it large or small. So a column times
s > 1 loses less of itself, as long as it does not stretch the grid, and dividing its input by s takes s back:

    W x  =  (W diag s) (x / s)  ≈  Q(W diag s) (x / s),          s_j = (mean |x_j|)^r,      r = 0, 0.05 .. 0.95

The division costs nothing: it is folded into what makes x, the gain of a norm or the rows of a linear layer. r is the
one whose quantized outputs are nearest to the true ones; r = 0 is rounding to nearest. Then the range of each group is
shrunk (clip search), where losing its largest weights costs less than a finer grid gains.

Saves    bytes: bits + (16 + bits) / g per weight in groups of g, as any grid of `bits` with scales and zero points.
Costs    a calibration pass and 20 forward passes per layer or group of layers that share an input; no training, no
         Hessian, and nothing at inference.
Paper    Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023, arXiv:2306.00978, section 3.
Follows  the authors' release (mit-han-lab/llm-awq): means and not maxima of |x|; s divided by √(max s · min s); the
         output of the whole attention is compared for q, k, v, of the whole gated feed-forward for gate and up, of the
         layer alone otherwise; v is scaled for o only where their shapes are equal; q and k are not clipped. All
         blocks are calibrated on full-precision inputs. Released grids do not force 0 into their range.
Symbols  W `[out, in]`; x `[…, in]`; s `[in]`; codes `[out, in]`; scale, zero, limit `[out, groups]`.
Kernel   kernels/quantization/weight_only.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.quantization.weight_only import Quantized, checked, quantize_each
from minitfm import surgery
from minitfm.model import Attention, Transformer

Outputs = Callable[[list[np.ndarray]], np.ndarray]
RATIOS = np.arange(20) / 20  # 1.0 is not among them
SHRINKS = 1 - np.arange(10) / 20  # 1.0 .. 0.55


def quantize(weight: np.ndarray, bits: int, group_size: int | None = None) -> Quantized:
    """Round weight `[out, in]` to the nearest of 2**bits values in each row of a group of columns; None: whole rows.

    scale = max(highest − lowest, 1e-5) / (2**bits − 1); zero = −rint(lowest / scale), clipped to 0 .. 2**bits − 1;
    code = rint(weight / scale) + zero, clipped likewise; halves go to the even number. 0 is not forced into the range:
    where all weights of a group have one sign, the clipped zero cuts off those far from 0, and where they are all
    equal they become ±1e-5 at most. Computed in the precision of weight, but float32 at least: it decides about zero
    where a range is −c to c, since −c / scale is half an odd number. Raises ValueError as `checked` does, and for a
    range that this precision cannot hold. Source: quantizer.py, pseudo_quantize_tensor.
    """
    size, top = checked(weight, bits, group_size)[1], 2**bits - 1
    groups = weight.astype(np.result_type(weight, np.float32)).reshape(len(weight), -1, size)  # [out, groups, size]
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    scale = np.maximum(high - low, 1e-5) / top
    if not np.isfinite(scale).all():
        raise ValueError(f"weight has a range from {low.min()} to {high.max()}, which {scale.dtype} cannot hold")
    zero = (-np.rint(low / scale)).clip(0, top)
    codes = (np.rint(groups / scale[..., None]) + zero[..., None]).clip(0, top).astype(np.uint8)
    grids = scale.astype(np.float64), zero.astype(np.float64)
    return Quantized(codes.reshape(weight.shape), *grids, np.arange(weight.shape[1]) // size, bits)


def channel_scales(magnitude: np.ndarray, ratio: float) -> np.ndarray:
    """s `[in]` from each channel's mean |x|: magnitude**ratio, at least 1e-4, divided by √(max · min) of these.

    So the largest times the smallest scale is 1; ratio 0 gives ones. magnitude is float64 `[in]`. Raises ValueError if
    it is not finite or negative anywhere. Source: auto_scale.py, _search_module_scale.
    """
    if not ((magnitude >= 0) & np.isfinite(magnitude)).all():
        raise ValueError("magnitude must be finite and not negative")
    scales = np.maximum(magnitude**ratio, 1e-4)
    return scales / np.sqrt(scales.max() * scales.min())


@dataclass(frozen=True)
class Scaling:
    """What a search found: the ratio, its scales `[in]`, and the loss of each of `RATIOS`."""

    ratio: float
    scales: np.ndarray
    losses: np.ndarray


def search_scales(
    weights: Sequence[np.ndarray], x: np.ndarray, outputs: Outputs, bits: int, group_size: int | None = None
) -> Scaling:
    """The first of `RATIOS` whose scales let the quantized layers disturb `outputs` least.

    weights  of the layers that read x, each `[out, in]`; they share one vector of scales
    x        calibration inputs `[…, in]`; channel_scales gets the mean of |x| over all tokens, in float64
    outputs  what the inspected module computes from x with these weights in place of its own, any shape

    `outputs` is called for the weights as they are, and for each ratio with quantize(W · s) / s, dequantized, where s
    multiplies columns: the division stands for the inputs being divided. A ratio's loss is the mean squared difference
    of the two. Nothing is modified. Raises ValueError where x or what `outputs` gives is not finite, x is empty or
    does not fit a weight, and as `quantize` does. Source: auto_scale.py, _search_module_scale.
    """
    x = np.asarray(x, dtype=np.float64).reshape(-1, x.shape[-1])
    if x.size == 0 or any(weight.shape[-1] != x.shape[1] for weight in weights):
        raise ValueError(f"x {x.shape} must hold tokens of the weights' inputs, got {[w.shape for w in weights]}")
    expected, magnitude = outputs(list(weights)), np.abs(x).mean(axis=0)
    losses = np.empty(len(RATIOS))
    for i, ratio in enumerate(RATIOS):
        scales = channel_scales(magnitude, ratio)
        rounded = [quantize(weight * scales, bits, group_size).dequantize() / scales for weight in weights]
        losses[i] = np.mean((outputs(rounded) - expected) ** 2)
    if not np.isfinite(losses).all():
        raise ValueError("outputs must be finite: those of the weights as they are, and of the quantized ones")
    best = int(np.argmin(losses))  # the first of equals
    return Scaling(float(RATIOS[best]), channel_scales(magnitude, RATIOS[best]), losses)


def search_clip(
    weight: np.ndarray, x: np.ndarray, bits: int, group_size: int | None = None, samples: int = 512
) -> np.ndarray:
    """The largest magnitude that each row of a group should keep: limit `[out, groups]`, for `clip`.

    For each row of a group of weight `[out, in]`, the first of `SHRINKS` whose limit, shrink · absmax, lets the clipped
    and then quantized weights change the group's own part of the output least: the mean over tokens of
    (Σ_{j in group} x_j (q_j − w_j))². Of x `[tokens, in]` every (tokens // samples)-th token counts, from the first on;
    with fewer tokens than samples, all do (the release divides by zero). Raises ValueError for no tokens, x that is
    not finite or does not fit, samples < 1, and as `quantize` does. Source: auto_clip.py, auto_clip_layer.
    """
    exact, size = checked(weight, bits, group_size)
    weight, x = weight.astype(np.result_type(weight, np.float32)), np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != weight.shape[1] or len(x) == 0 or samples < 1 or not np.isfinite(x).all():
        raise ValueError(f"need finite x [tokens, {weight.shape[1]}] and samples >= 1, got x {x.shape}, {samples}")
    x = x[:: max(len(x) // samples, 1)].reshape(-1, weight.shape[1] // size, size).swapaxes(0, 1)
    moments = x.swapaxes(1, 2) @ x  # [groups, size, size]; Σ (x · e)² = e · Σ(x xᵀ) · e, tokens times the mean
    largest = np.abs(weight.reshape(len(weight), -1, size)).max(axis=-1)  # [out, groups]
    limit, least = largest.copy(), np.full(largest.shape, np.inf)
    for shrink in SHRINKS.tolist():
        error = quantize(clip(weight, shrink * largest), bits, group_size).dequantize() - exact
        error = error.reshape(len(weight), -1, size).swapaxes(0, 1)  # [groups, out, size]
        loss = ((error @ moments) * error).sum(axis=-1).T
        better = loss < least
        limit[better], least[better] = (shrink * largest)[better], loss[better]
    return limit


def clip(weight: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """weight `[out, in]`, in each row group k of neighbouring columns clipped to ± its limit `[out, groups]`."""
    limit = np.repeat(limit, weight.shape[1] // limit.shape[1], axis=1)
    return weight.clip(-limit, limit)


@torch.no_grad()
def fold(previous: nn.Module, readers: Sequence[nn.Linear], scales: Tensor) -> None:
    """Multiply the columns of the readers' weights by scales `[in]`, and divide what `previous` gives them by it.

    previous is a norm, whose `weight` `[in]` is divided, or a linear layer, the rows of whose `weight` `[in, …]` are;
    its `bias`, where it has one, is divided too, the readers' stay. Scales first get the dtype of what they change. In
    place; the function of the model is the same up to rounding. Raises ValueError, before anything is changed, where
    shapes do not fit or scales are not positive and finite. Source: auto_scale.py, scale_ln_fcs and scale_fc_fc.
    """
    channels = {len(previous.get_parameter("weight")), *(reader.in_features for reader in readers)}
    if scales.dim() != 1 or channels != {len(scales)}:
        raise ValueError(f"scales must be [in], got {tuple(scales.shape)} for layers of {sorted(channels)} channels")
    if not ((scales > 0) & scales.isfinite()).all():
        raise ValueError("scales must be positive and finite")
    for parameter in previous.parameters():  # weight, and bias if there is one
        parameter /= scales.to(parameter).unflatten(0, (-1, *[1] * (parameter.dim() - 1)))
    for reader in readers:
        reader.weight *= scales.to(reader.weight)


@dataclass(frozen=True)
class Step:
    """Names: of a block, what makes an input in it, the layers that read it, the module whose output is compared."""

    block: str
    previous: str
    readers: tuple[str, ...]
    inspected: str


def steps(model: Transformer) -> list[Step]:
    """The steps of all blocks in the order of the release: norm → q, k, v; v → o; norm → gate, up; up → down."""
    found, layers = [], surgery.linears(model)
    for norm, readers in surgery.norm_readers(model).items():
        block, module = norm.rpartition(".")[0], readers[0].rpartition(".")[0]
        found.append(Step(block, norm, tuple(readers), module if len(readers) > 1 else readers[0]))
        attention = module.endswith("attention")
        last = f"{module}.{'o_proj' if attention else 'down_proj'}"
        # With grouped queries, several channels of o would share one row of v.
        if not attention or layers[readers[-1]].weight.shape == layers[last].weight.shape:
            found.append(Step(block, readers[-1], (last,), last))
    return found


@torch.no_grad()
def search_step(model: Transformer, step: Step, x: Tensor, bits: int, group_size: int | None) -> Scaling:
    """`search_scales` for one step of a model, which is left as it was; x `[N, T, in]` is what the readers read."""
    module = model.get_submodule(step.inspected)
    places = (model.cos[: x.shape[1]], model.sin[: x.shape[1]], None) if isinstance(module, Attention) else ()
    readers = [model.get_parameter(f"{name}.weight") for name in step.readers]
    before = [weight.clone() for weight in readers]

    def outputs(weights: Sequence[np.ndarray]) -> np.ndarray:
        for reader, weight in zip(readers, weights, strict=True):
            reader.copy_(torch.from_numpy(weight))
        return torch.cat([module(part, *places) for part in x.split(8)]).double().numpy(force=True)

    try:
        held = [weight.double().numpy(force=True) for weight in before]
        return search_scales(held, x.double().numpy(force=True), outputs, bits, group_size)
    finally:
        for reader, weight in zip(readers, before, strict=True):
            reader.copy_(weight)


def search_block(
    model: Transformer, tokens: Tensor, chosen: list[Step], bits: int, group_size: int | None, clipping: bool
) -> dict[str, np.ndarray]:
    """Scale the layers of one block, given by its steps, in place; return the limits of those that `clip` should get.

    All scales are searched before any is folded; limits are searched for scaled weights and their scaled inputs.
    """
    layers = {name: layer for name, layer in surgery.linears(model).items() if name.startswith(f"{chosen[0].block}.")}
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, x in surgery.record_inputs(model, tokens, list(layers)):
        seen[name].append(x)
    inputs = {name: torch.cat(parts) for name, parts in seen.items()}
    found = [search_step(model, step, inputs[step.readers[0]], bits, group_size) for step in chosen]
    for step, scaling in zip(chosen, found, strict=True):
        scales = torch.from_numpy(scaling.scales)
        fold(model.get_submodule(step.previous), [layers[name] for name in step.readers], scales)
        inputs |= {name: inputs[name] / scales.to(inputs[name]) for name in step.readers}
    limits = {}
    for name, layer in layers.items() if clipping else ():
        if not name.endswith(("q_proj", "k_proj")):  # their outputs meet in a product: a part alone says too little
            x = inputs[name].flatten(0, 1).numpy(force=True)
            limits[name] = search_clip(layer.weight.numpy(force=True), x, bits, group_size)
    return limits


@torch.no_grad()
def quantize_model(
    model: Transformer, tokens: Tensor, bits: int, group_size: int | None = None, clipping: bool = True
) -> dict[str, Quantized]:
    """Quantize the linear layers of the blocks by AWQ, in place: their weights become the dequantized ones.

    tokens `[N, T]` are calibration text. Scales are folded into norms, v and up; nothing is rounded before all blocks
    have been searched, so each is calibrated on full-precision inputs. Without `clipping` ranges are not shrunk.
    Returns what each layer became. ValueError for empty tokens, blocks that are not dense, and as `quantize` raises it.
    """
    layers, limits = surgery.linears(model), {}
    for _, chosen in groupby(steps(model), lambda step: step.block):
        limits |= search_block(model, tokens, list(chosen), bits, group_size, clipping)
    for name, limit in limits.items():
        layers[name].weight.copy_(torch.from_numpy(clip(layers[name].weight.numpy(force=True), limit)))
    return quantize_each(model, partial(quantize, bits=bits, group_size=group_size))


def round_model(model: Transformer, bits: int, group_size: int | None = None) -> dict[str, Quantized]:
    """The baseline, round to nearest (RTN): as `quantize_model` without scales and clipping, so without calibration."""
    return quantize_each(model, partial(quantize, bits=bits, group_size=group_size))


def options(parser) -> None:
    """Options of `python -m chapters run awq`."""
    parser.add_argument("--bits", type=int, default=4, help="1 to 8 (default 4)")
    parser.add_argument("--group-size", type=int, metavar="G", help="columns that share a grid (default: whole rows)")
    parser.add_argument("--no-clip", action="store_true", help="search scales only")


def apply(model: Transformer, tokens: Tensor, args) -> dict[str, float | str]:
    """Quantize `model` in place as `options` asked; the figures that `python -m chapters run awq` prints."""
    done = quantize_model(model, tokens, args.bits, args.group_size, clipping=not args.no_clip).values()
    bits = np.average([held.bits_per_weight() for held in done], weights=[held.codes.size for held in done])
    return {"bits per weight": float(bits)}


CHANNELS, FACTOR, GROUP = 13, 5.0, 32  # a tenth of the base model's channels, planted; columns that share a grid
ROLES = {("RTN", True): "baseline", ("AWQ", True): "method", ("RTN", False): "third", ("AWQ", False): "second"}
MODELS = {True: "outliers planted", False: "as trained"}


def model_of(lab: Lab, planted: bool, seed: int) -> Transformer:
    """A fresh model; `planted`: of the same function, but with outlier channels, drawn by the seed."""
    model = lab.model()
    if planted:
        surgery.plant_outliers(model, min(CHANNELS, lab.config.dim), FACTOR, seed)
    return model


def rises(lab: Lab, method: str, planted: bool, bits: int) -> np.ndarray:
    """By how much the perplexity rises `[seeds]`; a seed draws planted channels and calibration text."""
    models = [model_of(lab, planted, seed) for seed in lab.seeds]
    for seed, model in zip(lab.seeds, models, strict=True):
        if method == "AWQ":
            quantize_model(model, lab.calibration(seed, 32 if lab.full else 4), bits, GROUP)
        else:
            round_model(model, bits, GROUP)
    return np.array([lab.perplexity(model) - lab.base_perplexity for model in models])


def ratio_losses(lab: Lab, planted: bool) -> np.ndarray:
    """Loss of each ratio for q, k, v of the first block at 3 bits, that of rounding to nearest = 1."""
    model = model_of(lab, planted, lab.seeds[0])
    step = steps(model)[0]
    recorded = surgery.record_inputs(model, lab.calibration(lab.seeds[0], 8), [step.readers[0]])
    losses = search_step(model, step, torch.cat([x for _, x in recorded]), 3, GROUP).losses
    return losses / losses[0]


def picture(found: dict[tuple[str, bool, int], np.ndarray], losses: dict[bool, np.ndarray], base: float) -> Figure:
    """What a ratio does to the output of an attention layer, and what the method does to the model."""
    fig, (left, right) = panels(2, width=7.4, height=3.0)
    for planted, words in MODELS.items():
        left.plot(RATIOS, losses[planted], **series(ROLES["AWQ", planted]), label=words)
    left.set(xlabel="ratio r, 0 is RTN", ylabel="error (RTN = 1)")
    left.set_ylim(0, 1.4 * max(values.max() for values in losses.values()))  # room for the legend
    for (method, planted), role in ROLES.items():
        means = [base + found[method, planted, bits].mean() for bits in (3, 4)]
        right.plot([3, 4], means, **series(role), label=f"{method}, {MODELS[planted]}")
    right.axhline(base, **series("reference"), label="full precision")
    right.set(xlabel="bits per code", ylabel="perplexity", xticks=[3, 4])
    legend(left)
    legend(right, fontsize=8)
    return fig


def claim(lab: Lab) -> Claim:
    """Where a few channels are large, AWQ at 3 bits loses less than rounding to nearest; elsewhere they are closer."""
    found = {(*key, bits): rises(lab, *key, bits) for key in ROLES for bits in (3, 4)}
    gains = {planted: found["RTN", planted, 3] - found["AWQ", planted, 3] for planted in MODELS}
    less, closer = gains[True].min() > 0, abs(gains[False].mean()) < gains[True].mean() / 2
    rise = {key: float(values.mean()) for key, values in found.items()}
    pairs = [f"{rise['AWQ', planted, 3]:.2f} against {rise['RTN', planted, 3]:.2f}" for planted in MODELS]
    sentence = (
        f"With planted outlier channels 3-bit AWQ {'loses' if less else 'does not lose'} less than RTN: in groups of "
        f"{GROUP}, perplexity {lab.base_perplexity:.2f} rises by {pairs[0]}; "
        f"without them the two are {'closer' if closer else 'no closer'}, {pairs[1]}."
    )
    numbers = {"perplexity, full precision": lab.base_perplexity}
    numbers |= {f"rise, {method} {bits} bits, {MODELS[p]}": value for (method, p, bits), value in rise.items()}
    fig = picture(found, {planted: ratio_losses(lab, planted) for planted in MODELS}, lab.base_perplexity)
    setting = f"{CHANNELS} channels of every block norm × {FACTOR:g}, same function: large models grow such channels"
    return Claim(sentence, bool(less and closer), numbers, fig, f"{setting}, small ones do not; seeds {lab.seeds}")
