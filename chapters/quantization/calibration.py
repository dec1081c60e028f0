"""Calibration: choose before the model runs how far the grid of its activations shall reach.

    scale = limit / (2^(bits − 1) − 1)                    what lies beyond ± limit is clipped to it

Activations change with every input; a static grid must be chosen from samples. Reaching to the largest value of all
wastes the grid on a few outliers; clipping them costs what they lose. The fewer bits, the more it pays to clip. Batches
are not kept: a histogram of magnitudes is enough to choose from, of bins [k · width, (k + 1) · width).

largest      no clipping, the largest magnitude of all batches.
moving       the batches' largest magnitudes, averaged with a weight that fades.
percentile   the bin that is reached by a share of all magnitudes.
mse          the limit with the least Σ counts · (center − rounded center)².
entropy      the limit with the least KL(P ‖ Q): P the bins up to it, with all beyond added to the last; Q the same bins
             without that, each replaced by the mean of those that share its level.

Saves    operations: no maximum of every token at run time, and no second pass over it.
Costs    a calibration pass; quality where the samples were not typical.
Paper    entropy: Migacz 2017, "8-bit inference with TensorRT"; all: Wu et al. 2020, arXiv:2004.09602, section 3.2.
Follows  NVIDIA's Model Optimizer: 2048 bins up to the largest magnitude of the first batch, more of the same width
         where a later batch is larger; bin 0, which holds the zeros, counts as bin 1 does in the entropy; candidates
         from bin 128 on; of equal divergences the last. Its normalisation of P and Q is without effect.
Symbols  counts `[bins]`; limit, width in the unit of the activations; levels: magnitudes of the grid.
Kernel   kernels/quantization/calibration.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import figure, legend, series
from chapters.lab import Lab
from chapters.quantization.uniform import rounded
from minitfm import surgery
from minitfm.model import Transformer

BINS = 2048


@dataclass(frozen=True)
class Histogram:
    """Magnitudes: counts int64 `[bins]`, each bin `width` wide from 0, and the largest magnitude of each batch."""

    counts: np.ndarray
    width: float
    largest: tuple[float, ...]


def count_magnitudes(x: np.ndarray, width: float, bins: int) -> tuple[np.ndarray, float]:
    """How many |x| lie in each bin, and the largest |x|: (counts int64 `[bins]`, largest); the kernel's reference.

    Bin k holds k · width <= |x| < (k + 1) · width, by the integer part of |x| / width, divided in the precision of x;
    what lies beyond the last bin counts in it, however far. x holds floats, has any shape and stays as it is. Raises
    ValueError for an empty x, one that is not finite, a width that is not above 0, and fewer than one bin.
    """
    if np.size(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"x must be finite and not empty, got shape {np.shape(x)}")
    if not width > 0 or bins < 1:
        raise ValueError(f"need width > 0 and bins >= 1, got width={width}, bins={bins}")
    magnitudes = np.abs(x).ravel()
    places = np.minimum(magnitudes / magnitudes.dtype.type(width), bins - 1).astype(np.int64)
    return np.bincount(places, minlength=bins), float(magnitudes.max())


Count = Callable[..., tuple[np.ndarray, float]]


def extended(seen: Histogram | None, batch, bins: int = BINS, count: Count = count_magnitudes) -> Histogram:
    """The histogram `seen` so far and one more batch, floats of any shape; None: this batch is the first.

    The first batch's largest magnitude is the upper end of `bins` bins. Where a later one's is beyond the end, bins of
    the same width are added until there are ceil(largest / width). `count` counts, as `count_magnitudes` does.
    Raises ValueError as `count`, and for a first batch of nothing but zeros, which has no width.
    """
    if seen is None:
        seen = Histogram(np.zeros(bins, np.int64), float(abs(batch).max()) / bins if batch.size else 1.0, ())
    counts, largest = count(batch, seen.width, len(seen.counts))
    if seen.largest and (needed := math.ceil(largest / seen.width)) > len(seen.counts):
        counts, largest = count(batch, seen.width, needed)
    counts = counts.copy()
    counts[: len(seen.counts)] += seen.counts
    return Histogram(counts, seen.width, (*seen.largest, largest))


def collect(batches: Iterable[np.ndarray], bins: int = BINS) -> Histogram:
    """The histogram of all batches, by `extended`. Raises ValueError as that, and for no batches."""
    seen = None
    for batch in batches:
        seen = extended(seen, batch, bins)
    if seen is None:
        raise ValueError("batches must hold at least one: a static grid needs calibration data")
    return seen


def largest_limit(histogram: Histogram) -> float:
    """The largest magnitude of all batches."""
    return max(histogram.largest)


def moving_limit(histogram: Histogram, momentum: float = 0.1) -> float:
    """The batches' largest magnitudes in turn, each moving the limit this share of its way; the first sets it.

    Raises ValueError unless 0 < momentum <= 1. Source: MovingAverageMinMaxObserver of torch.ao.
    """
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum must be above 0 and at most 1, got {momentum}")
    limit, *later = histogram.largest
    for largest in later:
        limit += momentum * (largest - limit)
    return limit


def percentile_limit(histogram: Histogram, percent: float) -> float:
    """The lower edge of the first bin with which at least `percent` of 100 magnitudes are counted.

    The histogram stays as it is. Raises ValueError unless 0 < percent <= 100. Source: histogram.py,
    _compute_amax_percentile, which adds up shares: their sum may miss a bin by rounding, that of the counts does not.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
    reached = np.cumsum(histogram.counts)
    return int(np.searchsorted(100 * reached, percent * reached[-1])) * histogram.width


def _candidates(histogram: Histogram, bits: int, start: int, stop: int, stride: int) -> np.ndarray:
    """start, start + stride, … below stop, or ValueError where that is nothing or bits are out of 2 .. 8."""
    if bits not in range(2, 9):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    if not 1 <= start < stop or stride < 1:
        raise ValueError(f"need 1 <= start < {stop} for {len(histogram.counts)} bins and stride >= 1, got {start=}")
    return np.arange(start, stop, stride)


def mse_limit(histogram: Histogram, bits: int, unsigned: bool = False, start: int = 128, stride: int = 1) -> float:
    """The limit with the least squared error among the centers of bins start, start + stride, … to the last.

    A center c, (k + ½) · width, is rounded to the nearest multiple of limit / top, ties to even, at most limit; top is
    2**(bits − 1) − 1, or 2**bits − 1 where `unsigned`. The error is Σ counts · (c − rounded c)², of all bins; of equal
    ones the first. The histogram stays as it is. Raises ValueError for bits outside 2 .. 8, a start or stride below 1,
    and a start that leaves no candidate. Source: _compute_amax_mse.
    """
    top = 2 ** (bits - 1 + unsigned) - 1
    centers = (np.arange(len(histogram.counts)) + 0.5) * histogram.width
    limits = centers[_candidates(histogram, bits, start, len(centers), stride)]
    errors = []
    for limit in limits:
        values = np.minimum(np.rint(centers / (limit / top)), top) * (limit / top)
        errors.append(((values - centers) ** 2 * histogram.counts).sum())
    return float(limits[np.argmin(errors)])


def divergence(bins: np.ndarray, stop: int, levels: int) -> float:
    """KL(P ‖ Q) for a limit at the upper end of the first `stop` of bins, float64 `[bins]`.

    P: those bins, the sum of all others added to the last of them. Q: those bins without that sum, each bin that is not
    empty replaced by the mean of the bins of its level that are not empty, an empty bin by 0. Bin k has level l if
    l · stop / levels <= k < (l + 1) · stop / levels. Both are divided by their sums, and Σ P ln(P / Q) is infinite
    where Q is 0 and P not. The bins stay as they are.
    """
    level = np.arange(stop) * levels // stop
    live = bins[:stop] > 0
    shared = np.bincount(level[live], bins[:stop][live], levels) / np.maximum(np.bincount(level[live], None, levels), 1)
    p, q = bins[:stop].copy(), np.where(live, shared[level], 0)
    p[-1] += bins[stop:].sum()
    p, q = p / p.sum(), q / max(q.sum(), np.finfo(float).tiny)
    present = p > 0
    with np.errstate(divide="ignore"):
        return float((p[present] * np.log(p[present] / q[present])).sum())


def entropy_limit(histogram: Histogram, bits: int, unsigned: bool = False, start: int = 128, stride: int = 1) -> float:
    """The limit with the least `divergence`, among the ends of the first start, start + stride, … bins.

    levels are 2**(bits − 1), or 2**bits where `unsigned`; bin 0 counts as bin 1 does; of equal divergences the last.
    Raises ValueError as `mse_limit`. Source: _compute_amax_entropy.
    """
    bins = histogram.counts.astype(np.float64)
    stops = _candidates(histogram, bits, start, len(bins) + 1, stride)
    bins[0] = bins[1]
    found = [divergence(bins, int(stop), 2 ** (bits - 1 + unsigned)) for stop in stops]
    return float(stops[len(found) - 1 - np.argmin(found[::-1])] * histogram.width)


class StaticLinear(nn.Linear):
    """A linear layer whose input is rounded to ± (2**(bits − 1) − 1) steps up to `limit`, and clipped there.

    Its parameters keep their names, so that a model with it is saved as a plain one. It is not trained. ValueError
    unless limit is above 0 and finite: a percentile that the first bin reaches is not.
    """

    def __init__(self, layer: nn.Linear, limit: float, bits: int) -> None:
        if not 0 < limit < math.inf:
            raise ValueError(f"limit must be above 0 and finite, got {limit}")
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device)
        self.weight, self.bias, self.top = layer.weight, layer.bias, 2 ** (bits - 1) - 1
        self.scale = limit / self.top

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., in]` -> `[.., out]`, in the dtype of x."""
        codes = (x / self.scale).round().clamp(-self.top, self.top)
        return F.linear(codes * self.scale, self.weight, self.bias)


def count_on_device(x: Tensor, width: float, bins: int) -> tuple[np.ndarray, float]:
    """`count_magnitudes` of activations on CUDA, by the kernel."""
    from kernels.quantization.calibration import count_magnitudes as kernel

    counts, largest = kernel(x.contiguous(), width, bins)
    return counts.cpu().numpy(), float(largest)


def histograms(model: Transformer, tokens: Tensor, bins: int = BINS) -> dict[str, Histogram]:
    """The magnitudes that reach each block linear on tokens `[N, T]`, a histogram for each, streamed by batches."""
    found: dict[str, Histogram] = {}
    for name, x in surgery.record_inputs(model, tokens, list(surgery.linears(model))):
        count = count_on_device if x.is_cuda else lambda x, *rest: count_magnitudes(x.float().numpy(), *rest)
        found[name] = extended(found.get(name), x, bins, count)
    return found


METHODS: dict[str, Callable[..., float]] = {
    "largest": lambda histogram, bits: largest_limit(histogram),
    "moving": lambda histogram, bits: moving_limit(histogram),
    "percentile": lambda histogram, bits: percentile_limit(histogram, 99.9),
    "mse": partial(mse_limit, stride=4),
    "entropy": partial(entropy_limit, stride=4),
}


@torch.no_grad()
def quantize_model(model: Transformer, seen: dict[str, Histogram], method: str, bits: int = 8) -> None:
    """Round the block linears' weights to 8 bits per row and, from now on, their inputs to `bits`, in place.

    `seen` as `histograms` finds it. ValueError for an unknown method, and bits outside 2 .. 8.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, layer in surgery.linears(model).items():
        layer.weight.copy_(
            torch.from_numpy(rounded(layer.weight.numpy(force=True), 8, "channel", scheme="smoothquant"))
        )
        surgery.replace(model, name, StaticLinear(layer, METHODS[method](seen[name], bits), bits))


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run calibration`."""
    parser.add_argument("--bits", type=int, default=8, help="of activations, 2 to 8 (default 8); weights have 8")
    parser.add_argument("--method", choices=METHODS, default="mse", help="what chooses the limits (default mse)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Quantize weights and activations of `model`; the weights can be saved, activations are rounded as it runs."""
    seen = histograms(model, tokens)
    kept = np.mean([METHODS[args.method](each, args.bits) / largest_limit(each) for each in seen.values()])
    quantize_model(model, seen, args.method, args.bits)
    layers = [layer for layer in model.modules() if isinstance(layer, StaticLinear)]
    rows, weights = (sum(part) for part in zip(*((x.out_features, x.weight.numel()) for x in layers), strict=True))
    return {"bits per weight": 8 + 16 * rows / weights, "limit, share of the largest": float(kept)}


def measure(lab: Lab, seed: int, bits: list[int]) -> dict[str, list[float]]:
    """Perplexity by method, for each number of bits of the activations."""
    seen, found = histograms(lab.model(), lab.calibration(seed, count=64)), {}
    for method in METHODS:
        found[method] = []
        for width in bits:
            model = lab.model()
            quantize_model(model, seen, method, width)
            found[method].append(lab.perplexity(model))
    return found


ROLES = dict(zip(METHODS, ("baseline", "muted", "third", "method", "second"), strict=True))


def picture(bits: list[int], found: dict[str, list[float]], base: float) -> Figure:
    """Perplexity against the bits of activations, a line for each method."""
    fig, axes = figure()
    for method, perplexities in found.items():
        axes.plot(bits, perplexities, **series(ROLES[method]), label=method)
    axes.axhline(base, color="black", linestyle="--", label="full precision")
    axes.set_yscale("log")
    axes.set_xticks(bits)
    axes.minorticks_off()
    axes.set(xlabel="bits of activations", ylabel="perplexity")
    legend(axes)
    return fig


def claim(lab: Lab) -> Claim:
    """With few bits it pays to clip: the limit of least squared error beats the largest value; with 8 it is level."""
    bits = [8, 6, 4]
    each = [measure(lab, seed, bits) for seed in lab.seeds]
    found = {method: np.mean([one[method] for one in each], axis=0).tolist() for method in METHODS}
    base = lab.base_perplexity
    largest, mse = (dict(zip(bits, found[method], strict=True)) for method in ("largest", "mse"))
    sentence = (
        f"Static 4-bit grids of activations that reach to the largest value raise perplexity {base:.2f} to "
        f"{largest[4]:.1f}, those up to the limit of least squared error to {mse[4]:.1f}; "
        f"with 8 bits it is {largest[8]:.2f} and {mse[8]:.2f}."
    )
    numbers = {"perplexity, full precision": base}
    numbers |= {
        f"perplexity, {count} bits, {method}": value
        for method, values in found.items()
        for count, value in zip(bits, values, strict=True)
    }
    setting = f"inputs of all block linears, weights 8 bits per row, 64 training sequences of each of seeds {lab.seeds}"
    holds = mse[4] < largest[4] and abs(mse[8] - largest[8]) < 0.02 * base
    return Claim(sentence, bool(holds), numbers, picture(bits, found, base), setting)
