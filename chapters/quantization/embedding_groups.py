"""Per-embedding-group quantization (PEG): give the few wide channels of an activation a grid of their own.

    code[t, c] = clip(rint(x[t, c] / scale[g]) + zero[g], 0, 2^bits − 1)          g: the group of channel c, 0 .. K − 1

In a transformer a few channels of the embedding axis are tens of times as wide as the others, in every token. One grid
for all channels must span them, and leaves the others a handful of values. A grid for each channel cannot be multiplied
in integers, since its scale would stand inside the sum over channels. K groups can: one integer sum for each group.

    y[t, o] = scale_w Σ_g scale[g] (Σ_{c in g} code[t, c] w[o, c]  −  zero[g] Σ_{c in g} w[o, c])

The permutation sorts channels by range before they are cut into groups of equal size: the wide ones meet in one group.
It is fixed after calibration, and costs nothing where the layer before can write its channels in that order.

Saves    bytes: activations of 8 bits instead of 16, and a product of 8-bit integers, which runs at twice the rate.
Costs    K rescalings of a sum instead of one: K out operations a token beside 2 in · out. Ranges must be calibrated.
Paper    Bondarenko, Nagel, Blankevoort 2021, arXiv:2109.12948, section 3.2.
Follows  the authors' release (transformer-quantization): unsigned codes; the range always holds 0; scale is at least
         1e-8; x / scale is rounded, ties to even, before zero is added. The released estimator takes the ranges of the
         last calibration batch, and so does its permutation, whatever momentum is asked for; here they are those of all
         batches together.
Symbols  x `[tokens, channels]`; scale, zero `[K]`; order `[channels]`: the channel at each place; codes as x, by place.
Kernel   kernels/quantization/embedding_groups.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import figure, legend, series
from chapters.lab import Lab
from minitfm import surgery
from minitfm.model import Transformer


def channel_ranges(batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of each channel, (low, high) `[channels]`, over batches `[.., channels]`.

    In the dtype of the batches. Raises ValueError for no batch, a batch without a value, and values that are not
    finite.
    """
    lows, highs = [], []
    for batch in batches:
        tokens = np.asarray(batch).reshape(-1, np.shape(batch)[-1])
        if tokens.size == 0 or not np.isfinite(tokens).all():
            raise ValueError(f"batches must hold finite values, got {'none' if tokens.size == 0 else 'others'}")
        lows.append(tokens.min(axis=0))
        highs.append(tokens.max(axis=0))
    if not lows:
        raise ValueError("batches must hold at least one batch")
    return np.min(lows, axis=0), np.max(highs, axis=0)


def group_order(low: np.ndarray, high: np.ndarray, permute: bool = True) -> np.ndarray:
    """The channel that stands at each place, int64 `[channels]`; groups are runs of places.

    Channels by rising range high − low `[channels]`, ties in their order; as they are without `permute`.
    Source: range_estimators.py, argsort of the ranges.
    """
    return np.argsort(high - low, kind="stable") if permute else np.arange(len(low))


def find_grids(
    low: np.ndarray, high: np.ndarray, order: np.ndarray, groups: int, bits: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """A grid for each of `groups` runs of len(order) / groups places: (scale, zero) `[groups]`, in the dtype of low.

    low, high `[channels]`, float32 or float64, belong to channels and stay as they are; order[place] is the channel at
    a place. A group's range goes from the least low of its channels, or 0 if that is less, to their largest high, or 0
    if that is more. scale = range / (2**bits − 1), at least 1e-8; zero = −low / scale, rounded with ties to even.
    Raises ValueError for bits outside 1 .. 8, groups that do not divide the channels, a low above its high, and ranges
    that are not finite.
    Source: quantizers.py, AsymmetricUniformQuantizer.
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    if groups < 1 or len(order) % groups:
        raise ValueError(f"groups must divide the {len(order)} channels, got {groups}")
    if not (low <= high).all():
        raise ValueError("low must not exceed high in any channel")
    low = np.minimum(low[order].reshape(groups, -1).min(axis=1), 0)
    high = np.maximum(high[order].reshape(groups, -1).max(axis=1), 0)
    with np.errstate(over="ignore"):  # what overflows is refused
        scale = np.maximum((high - low) / (2**bits - 1), low.dtype.type(1e-8))
    if not np.isfinite(scale).all():
        raise ValueError("low and high must be finite, and so must the range of a group")
    return scale, np.rint(abs(low) / scale)


def quantize_groups(x: np.ndarray, order: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int = 8) -> np.ndarray:
    """Codes uint8 `[tokens, channels]` of x `[tokens, channels]`, by place: the kernel's reference.

    codes[t, place] = clip(rint(x[t, order[place]] / scale[g]) + zero[g], 0, 2**bits − 1), ties to even, where
    g = place // (channels / groups) and scale, zero have shape `[groups]`. In the wider precision of x and scale; x
    stays as it is. Raises ValueError for bits outside 1 .. 8, unless order is a permutation of the channels, scale and
    zero are equally many, which divide the channels, x is finite, and scale positive and finite.
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    channels, groups = x.shape[-1], len(scale)
    if not np.array_equal(np.sort(order), np.arange(channels)):
        raise ValueError(f"order must be a permutation of the {channels} channels of x")
    if scale.shape != zero.shape or groups == 0 or channels % groups:
        raise ValueError(f"scale and zero must be [groups], a divisor of {channels}; got {scale.shape}, {zero.shape}")
    if not (np.isfinite(x).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("x must be finite, and scale positive and finite")
    grouped = x[:, order].reshape(len(x), groups, -1)  # [tokens, groups, channels / groups]
    with np.errstate(over="ignore"):  # infinity clips, too
        codes = np.rint(grouped / scale[:, None]) + zero[:, None]
    return np.clip(codes, 0, 2**bits - 1).astype(np.uint8).reshape(x.shape)


def grouped_product(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, weight_codes: np.ndarray, weight_scale: float
) -> np.ndarray:
    """The product of quantized activations and weights in integers, but for one rescaling per group: `[tokens, out]`.

    codes uint8 `[tokens, channels]` and weight_codes int8 `[out, channels]`, both by place, one weight being
    weight_scale * code; scale, zero `[groups]`. Returns float64. Sums of a group are exact integers of 32 bits.
    Raises ValueError if the shapes do not fit together.
    """
    groups, channels = len(scale), codes.shape[-1]
    if scale.shape != zero.shape or channels % max(groups, 1) or weight_codes.shape[-1] != channels:
        raise ValueError(
            f"codes {codes.shape}, scale {scale.shape}, zero {zero.shape}, weight_codes {weight_codes.shape} do not fit"
        )
    x = codes.reshape(len(codes), groups, -1).astype(np.int32)
    w = weight_codes.reshape(len(weight_codes), groups, -1).astype(np.int32)
    total = np.einsum("tgc,ogc->gto", x, w) - zero.astype(np.int32)[:, None, None] * w.sum(-1).T[:, None, :]
    return weight_scale * np.einsum("gto,g->to", total.astype(np.float64), scale.astype(np.float64))


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """The values of a weight on one symmetric grid for the whole tensor, ± absmax at its ends, as in the paper."""
    scale = weight.abs().max().clamp(min=1e-8) / max(2 ** (bits - 1) - 1, 1)
    return (weight / scale).round() * scale


class GroupedLinear(nn.Linear):
    """A linear layer whose input is rounded to the grids of its groups: x `[.., in]` -> `[.., out]`.

    It holds the grids, places and `bits` of `find_grids`; its parameters keep their names, so that a model with it is
    saved as a plain one. On CUDA the kernel makes the codes. It is not trained.
    """

    def __init__(self, layer: nn.Linear, order: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device)
        self.weight, self.bias, self.bits = layer.weight, layer.bias, bits
        device = layer.weight.device
        self.order = nn.Buffer(torch.from_numpy(order).to(device), persistent=False)
        self.scale = nn.Buffer(torch.from_numpy(scale).to(device, torch.float32), persistent=False)
        self.zero = nn.Buffer(torch.from_numpy(zero).to(device, torch.float32), persistent=False)

    def codes(self, x: Tensor) -> Tensor:
        """x `[tokens, in]` as codes by place, uint8 on CUDA, whole float32 numbers elsewhere."""
        if x.is_cuda:
            from kernels.quantization.embedding_groups import quantize_groups as kernel

            return kernel(x.contiguous(), self.order, self.scale, self.zero, self.bits)
        grouped = x[:, self.order].float().unflatten(1, (len(self.scale), -1))
        codes = (grouped / self.scale[:, None]).round() + self.zero[:, None]
        return codes.clamp(0, 2**self.bits - 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """x in any floating dtype; the result has the same."""
        codes = self.codes(x.reshape(-1, x.shape[-1])).float().unflatten(1, (len(self.scale), -1))
        values = ((codes - self.zero[:, None]) * self.scale[:, None]).flatten(1).to(x.dtype)
        return F.linear(values, self.weight[:, self.order], self.bias).unflatten(0, x.shape[:-1])


def input_ranges(model: Transformer, tokens: Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`channel_ranges` of the inputs of every block linear on tokens `[N, T]`, float32, streamed."""
    ranges: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, x in surgery.record_inputs(model, tokens, list(surgery.linears(model))):
        batch = x.float().numpy(force=True)
        ranges[name] = channel_ranges([*(ends[None] for ends in ranges.get(name, ())), batch.reshape(-1, x.shape[-1])])
    return ranges


@torch.no_grad()
def quantize_model(
    model: Transformer,
    ranges: dict[str, tuple[np.ndarray, np.ndarray]],
    groups: int = 8,
    permute: bool = True,
    bits: int = 8,
) -> None:
    """Round the block linears' weights and, from now on, their inputs, in place; `ranges` as `input_ranges` finds.

    `groups` 1 is one grid for all channels; 0 a grid for each, which no integer product can follow.
    ValueError as `find_grids` raises it.
    """
    for name, layer in surgery.linears(model).items():
        low, high = ranges[name]
        order = group_order(low, high, permute)
        grids = find_grids(low, high, order, groups or len(order), bits)
        layer.weight.copy_(round_weight(layer.weight, bits))
        surgery.replace(model, name, GroupedLinear(layer, order, *grids, bits))


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run embedding_groups`."""
    parser.add_argument("--bits", type=int, default=8, help="of weights and activations, 1 to 8 (default 8)")
    parser.add_argument("--groups", type=int, default=8, help="groups of channels (default 8)")
    parser.add_argument("--in-order", action="store_true", help="cut channels into groups as they stand")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Quantize weights and activations of `model`; the weights can be saved, activations are rounded as it runs."""
    ranges = input_ranges(model, tokens)
    quantize_model(model, ranges, args.groups, not args.in_order, args.bits)
    weights = [layer.weight.numel() for layer in model.modules() if isinstance(layer, GroupedLinear)]
    return {
        "bits per weight": args.bits + 16 * len(weights) / sum(weights),
        "bits per activation": float(args.bits),
        "rescalings per output": float(args.groups),
    }


CHANNELS, FACTOR = 2, 64.0  # outlier channels planted, as large models grow them


def measure(lab: Lab, seed: int, counts: list[int]) -> np.ndarray:
    """Perplexity `[2, counts]` of the model with planted outliers: channels in order, and sorted by range."""
    outlying = lab.model()
    surgery.plant_outliers(outlying, CHANNELS, FACTOR, seed)
    ranges = input_ranges(outlying, lab.calibration(seed, count=32))
    found = np.empty((2, len(counts)))
    for permute, at in np.ndindex(found.shape):
        model = lab.model()
        model.load_state_dict(outlying.state_dict())
        quantize_model(model, ranges, counts[at], bool(permute))
        found[permute, at] = lab.perplexity(model)
    return found


def picture(counts: list[int], found: dict[str, list[float]], base: float) -> Figure:
    """Perplexity against the number of groups."""
    fig, axes = figure()
    for role, (words, perplexities) in zip(("baseline", "method"), found.items(), strict=True):
        axes.plot(counts, perplexities, **series(role), label=words)
    axes.axhline(base, color="black", linestyle="--", label="full precision")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="groups of channels, a grid each", ylabel="perplexity")
    axes.minorticks_off()
    legend(axes)
    return fig


def claim(lab: Lab) -> Claim:
    """A few groups, sorted by range, win back what one grid for all channels loses to outlier channels."""
    counts = [1, 2, 4, 8, 16, 32]
    mean = np.mean([measure(lab, seed, counts) for seed in lab.seeds], axis=0)
    found: dict[str, list[float]] = {"channels in order": mean[0].tolist(), "sorted by range": mean[1].tolist()}
    base, few = lab.base_perplexity, counts.index(8)
    one, plain, ordered = mean[0, 0], mean[0, few], mean[1, few]
    won = (one - ordered) / (one - base)
    sentence = (
        f"With {CHANNELS} planted outlier channels, 8-bit weights and activations with one grid per tensor raise "
        f"perplexity {base:.2f} to {one:.1f}; 8 groups of channels leave {plain:.2f}, and "
        f"{ordered:.2f} if channels are sorted by range: {won:.0%} of the loss is won back."
    )
    numbers = {"perplexity, full precision": base, "loss won back": won}
    numbers |= {
        f"perplexity, {count} groups, {words}": value
        for words, values in found.items()
        for count, value in zip(counts, values, strict=True)
    }
    setting = (
        f"all block linears, static ranges of 32 training sequences, seeds {lab.seeds}; {CHANNELS} channels of each "
        f"norm's gain times {FACTOR:g} and the columns that read them divided by it: the function is unchanged"
    )
    holds = bool(ordered < plain < one and won > 0.5)
    return Claim(sentence, holds, numbers, picture(counts, found, base), setting)
