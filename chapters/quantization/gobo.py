"""GOBO: almost all weights of a layer lie on one bell curve and share a few values; the rare others are kept.

Fit a Gaussian to the weights of a layer. A weight of so little density under it that

    log p(w) = −log(σ √2π) − (w − μ)² / 2σ²  ≤  threshold        natural logarithm; threshold −4 in the paper

is an outlier and stays as it is. The others, the G group, take the nearest of 2^bits centroids. These begin as the
means of 2^bits equal shares of the sorted G group and then move as in K-means: each weight to its nearest centroid,
each centroid to the mean of its weights. K-means goes on until nothing moves, at the least *squared* error it finds.
GOBO stops as soon as the *absolute* error, Σ |w − centroid|, falls no further, and that is much sooner.

A density is per unit of weight. Multiply all weights by 10 and every log density falls by log 10 = 2.3, so that −4
finds more outliers though the shape is the same: with σ = 0.04 they lie beyond 3.5 σ, with σ = 0.4 beyond 2.8 σ, and
from σ = 22 on every weight is one. The threshold that then means the same is threshold − log 10.

Saves    bytes: `bits` per weight, 16 per centroid, per outlier 16 for what it exceeds its centroid by and 16 for its
         column, and 32 per row for where its outliers begin. At 3 bits, with 0.2% of outliers in rows of 4096, that
         is 3.07 bits per weight instead of 16. It needs no text and no training.
Costs    a lookup per weight. Centroids follow no grid, so no part of the product can be done in integers.
Paper    Zadeh, Edo, Awad, Moshovos 2020, arXiv:2005.03842. The authors' code is not public.
Follows  a third party's first step: density ≤ threshold; shares of ⌊n / 2^bits⌋ weights each, the largest n mod 2^bits
         in none. It stops there and takes codes from the edges of the shares; here a code is that of the nearest
         centroid, on a tie the lower. A layer is one matrix.
Symbols  W `[out, in]`; codes `[out, in]`; centroids `[2^bits]`, ascending; start, column, value: see `Codebook`.
Kernel   kernels/quantization/gobo.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from chapters.quantization.weight_only import checked
from chapters.shared.bit_fields import pack, unpack
from minitfm import surgery
from minitfm.model import Transformer

THRESHOLD = -4.0
Fit = tuple[np.ndarray, list[float]]  # centroids, and the absolute error before and after each move of them


@dataclass(frozen=True)
class Codebook:
    """A weight matrix as centroids, codes, and outliers by rows.

    codes          `[out, in]` uint8, under an outlier that of its nearest centroid
    centroids      `[2^bits]` float64, ascending
    start          `[out + 1]`: the outliers of row r are start[r] .. start[r + 1] − 1
    column, value  `[outliers]`: columns ascend in each row; value float64
    """

    codes: np.ndarray
    centroids: np.ndarray
    start: np.ndarray
    column: np.ndarray
    value: np.ndarray

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.centroids).bit_length() - 1

    @property
    def row(self) -> np.ndarray:
        """`[outliers]`: the row of each."""
        return np.repeat(np.arange(len(self.codes)), np.diff(self.start))

    def dequantize(self) -> np.ndarray:
        """The weights that it stands for, float64 `[out, in]`; outliers are exact."""
        weight = self.centroids[self.codes]
        weight[self.row, self.column] = self.value
        return weight

    def extra(self) -> np.ndarray:
        """`[outliers]`: what each outlier is more than the centroid of its code, which is what is stored of it."""
        return self.value - self.centroids[self.codes[self.row, self.column]]

    def bits_per_weight(self) -> float:
        """Storage: packed codes (padded to 4 rows and 32 columns), 16-bit centroids, 32 per outlier, 32-bit starts."""
        rows, columns = self.codes.shape
        padded = -(-rows // 4) * 4 * (-(-columns // 32) * 32)
        held = self.bits * padded + 16 * len(self.centroids) + 32 * len(self.value) + 32 * len(self.start)
        return held / self.codes.size


def outlier_mask(weight: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Which weights are outliers: bool in the shape of weight, True where log density ≤ threshold.

    The density is that of the Gaussian with the mean and the population standard deviation of all of weight, its log
    natural. It depends on the unit of weight: see the first lines of this file. Where all weights are equal there are
    no outliers; with threshold −inf neither. Raises ValueError for a threshold of NaN.
    """
    if np.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold}")
    weight = np.asarray(weight, dtype=np.float64)
    deviation = weight.std()
    if np.ptp(weight) == 0:  # where rounding may leave them a deviation
        return np.zeros(weight.shape, dtype=bool)
    z = (weight - weight.mean()) / deviation
    return -np.log(deviation * np.sqrt(2 * np.pi)) - z**2 / 2 <= threshold


def nearest(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The index of the nearest centroid for each value, uint8; on a tie the lower. Centroids ascend."""
    return np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values).astype(np.uint8)


def equal_shares(values: np.ndarray, bits: int) -> np.ndarray:
    """Means of 2^bits shares of the sorted values `[n]`, ⌊n / 2^bits⌋ in each; the largest few may be in none."""
    size = len(values) // 2**bits
    return np.sort(values)[: size * 2**bits].reshape(-1, size).mean(axis=1)


def moves(values: np.ndarray, centroids: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Centroids and the absolute error Σ |value − nearest centroid|: as given, and after each move of K-means.

    A move takes every centroid to the mean of the values nearest to it; one without values stays. The last move is the
    first that changes no value's centroid. values `[n]`, sorted: what is nearest to a centroid is a run of them.
    """
    number, before = np.arange(len(centroids)), np.zeros(0)
    while True:
        edges = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2, side="right")  # on a tie the lower
        count = np.diff(edges, prepend=0, append=len(values))
        yield centroids, float(np.abs(values - np.repeat(centroids, count)).sum())
        if np.array_equal(count, before):
            return
        total = np.bincount(np.repeat(number, count), values, len(centroids))
        centroids, before = np.where(count > 0, total / np.maximum(count, 1), centroids), count


def l1_centroids(values: np.ndarray, bits: int) -> Fit:
    """GOBO's centroids for values `[n]`, n ≥ 2^bits: float64 `[2^bits]`, ascending, and the absolute errors seen.

    From `equal_shares` on, `moves` until the absolute error is not less than before the move, or they end; the
    centroids are those of the least error. The errors begin with that of `equal_shares` and end with that of the last
    move made, be it better or not.
    """
    path = moves(np.sort(values), equal_shares(values, bits))
    best, least = next(path)
    errors = [least]
    for centroids, error in path:
        errors.append(error)
        if error >= least:
            break
        best, least = centroids, error
    return best, errors


def kmeans_centroids(values: np.ndarray, bits: int) -> Fit:
    """The same, moved until no value changes its centroid: a least squared error."""
    centroids, errors = zip(*moves(np.sort(values), equal_shares(values, bits)), strict=True)
    return centroids[-1], list(errors)


def linear_centroids(values: np.ndarray, bits: int) -> Fit:
    """2^bits values at equal distances from the least to the largest, never moved: the grid of plain rounding."""
    centroids, error = next(moves(np.sort(values), np.linspace(values.min(), values.max(), 2**bits)))
    return centroids, [error]


METHODS: dict[str, Callable[[np.ndarray, int], Fit]]
METHODS = {"l1": l1_centroids, "kmeans": kmeans_centroids, "linear": linear_centroids}


def gobo(weight: np.ndarray, bits: int, threshold: float = THRESHOLD, centroids: str = "l1") -> Codebook:
    """Quantize weight `[out, in]`, which is not modified: outliers by `outlier_mask`, centroids by one of METHODS.

    Raises ValueError for a weight or bits that `checked` refuses, NaN as threshold, an unknown method, and where the
    threshold leaves fewer than 2^bits weights that are no outliers.
    """
    weight = checked(weight, bits, None)[0]
    if centroids not in METHODS:
        raise ValueError(f"centroids must be one of {', '.join(METHODS)}, got {centroids!r}")
    outlier = outlier_mask(weight, threshold)
    inner = weight[~outlier]
    if len(inner) < 2**bits:
        raise ValueError(
            f"threshold {threshold} leaves {len(inner)} of {weight.size} weights that are no outliers, "
            f"{bits} bits need {2**bits}; densities depend on the scale of weight, here σ = {weight.std():.3g}"
        )
    values, _ = METHODS[centroids](inner, bits)
    start = np.concatenate([[0], np.cumsum(outlier.sum(axis=1))])
    return Codebook(nearest(weight, values), values, start, np.nonzero(outlier)[1], weight[outlier])


def codebook_matmul(
    x: np.ndarray, packed: np.ndarray, centroids: np.ndarray, start: np.ndarray, column: np.ndarray, extra: np.ndarray
) -> np.ndarray:
    """x `[tokens, in]` times the transpose of the weights that the rest stands for: float64 `[tokens, out]`.

    packed as `bit_fields.pack` makes it; centroids `[2^bits]`; start `[out + 1]`: in row r extra[i] is added in
    column[i], for i from start[r] to start[r + 1] − 1, columns ascending. Everything is converted to float64 first.
    Raises ValueError if the shapes do not fit together. The kernel's reference.
    """
    (rows, columns), bits = (len(start) - 1, x.shape[-1]), len(centroids).bit_length() - 1
    fits = packed.shape == (-(-rows // 4), bits, -(-columns // 32), 4) and len(centroids) == 2**bits
    if x.ndim != 2 or not fits or not start[-1] == len(column) == len(extra):
        shapes = ", ".join(str(part.shape) for part in (x, packed, centroids, start, column, extra))
        raise ValueError(f"x, packed, centroids, start, column, extra do not fit together: {shapes}")
    weight = centroids.astype(np.float64)[unpack(packed, rows, columns)]
    np.add.at(weight, (np.repeat(np.arange(rows), np.diff(start)), column.astype(int)), extra.astype(np.float64))
    return x.astype(np.float64) @ weight.T


class CodebookLinear(nn.Module):
    """A linear layer that holds a `Codebook`: x `[..., in]` -> x Wᵀ + bias `[..., out]`. It is not trained.

    On CUDA the kernel is called; elsewhere, in 64 bits, and where x wants a gradient, weights are expanded per call.
    """

    def __init__(self, held: Codebook, bias: Tensor | None = None, dtype: torch.dtype = torch.float16) -> None:
        """Centroids and outliers in `dtype`. ValueError: over 4 bits or 32768 columns, weights too large for it."""
        super().__init__()
        self.shape = held.codes.shape
        if self.shape[1] > 2**15:
            raise ValueError(f"held must have at most 32768 columns, got {self.shape[1]}")
        self.packed = nn.Buffer(torch.from_numpy(pack(held.codes, held.bits)))
        self.centroids = nn.Buffer(torch.from_numpy(held.centroids).to(dtype))
        self.start = nn.Buffer(torch.from_numpy(held.start).to(torch.int32))
        self.column = nn.Buffer(torch.from_numpy(held.column).to(torch.int16))
        self.extra = nn.Buffer(torch.from_numpy(held.extra()).to(dtype))
        if not (self.centroids.isfinite().all() and self.extra.isfinite().all()):
            raise ValueError(f"held must be finite in {dtype}, its weights reach {np.abs(held.dequantize()).max():.3g}")
        self.bias = bias

    def weight(self) -> Tensor:
        """The weights `[out, in]`, float32 (float64 if the centroids are)."""
        codes = unpack(self.packed, *self.shape, stack=torch.stack)
        precision = torch.promote_types(self.centroids.dtype, torch.float32)
        weight = self.centroids.to(precision)[codes]
        row = torch.arange(self.shape[0], device=weight.device).repeat_interleave(self.start.diff())
        return weight.index_put((row, self.column.long()), self.extra.to(precision), accumulate=True)

    def forward(self, x: Tensor) -> Tensor:
        """x in any floating dtype; the result has the same."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not x.is_cuda or x.dtype is torch.float64 or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.weight().to(x.dtype), bias)
        from kernels.quantization.gobo import codebook_matmul as kernel

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = kernel(rows, self.packed, self.centroids, self.start, self.column, self.extra).unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias


def quantize_model(model: Transformer, names: Iterable[str], **options) -> dict[str, Codebook]:
    """Give each named weight the values that `gobo` with these options leaves it; returns what each became."""
    done = {}
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        done[name] = gobo(weight.numpy(force=True), **options)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(done[name].dequantize()))
    return done


def stored_bits(held: Collection[Codebook]) -> float:
    """Bits per weight of several layers together."""
    return float(np.average([each.bits_per_weight() for each in held], weights=[each.codes.size for each in held]))


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run gobo`."""
    parser.add_argument("--bits", type=int, default=3, help="1 to 8 (default 3)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="log density of outliers (default -4)")
    parser.add_argument("--centroids", choices=METHODS, default="l1", help="how they are found (default l1)")
    parser.add_argument("--embedding", action="store_true", help="quantize the embedding, too")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Quantize `model` in place as `options` asked, without a look at tokens; what `run gobo` prints."""
    chosen = {"bits": args.bits, "threshold": args.threshold, "centroids": args.centroids}
    done = quantize_model(model, surgery.linears(model), **chosen).values()
    outliers = 100 * sum(len(held.value) for held in done) / sum(held.codes.size for held in done)
    report: dict[str, float | str] = {"bits per weight": stored_bits(done), "outliers, %": outliers}
    if args.embedding:
        report["bits per weight, embedding"] = stored_bits(quantize_model(model, ["embedding"], **chosen).values())
    return report


RIVALS = {  # what the claim compares: threshold, centroids, and how the figure draws it
    "GOBO": (THRESHOLD, "l1", "method"),
    "K-means": (THRESHOLD, "kmeans", "second"),
    "even centroids": (THRESHOLD, "linear", "third"),
    "plain rounding": (-np.inf, "linear", "baseline"),
}


def measure(lab: Lab, rival: str, bits: int) -> dict[str, float]:
    """Rise of perplexity and bits per weight, with the linear layers of all blocks quantized."""
    model, (threshold, centroids, _) = lab.model(), RIVALS[rival]
    done = quantize_model(model, surgery.linears(model), bits=bits, threshold=threshold, centroids=centroids)
    held = stored_bits(done.values()) if threshold > -np.inf else bits  # plain rounding has no lists of outliers
    return {"rise": lab.perplexity(model) - lab.base_perplexity, "bits": held}


def searches(lab: Lab, method: str, bits: int) -> list[list[float]]:
    """For each linear layer the absolute errors that one of METHODS saw."""
    weights = [layer.weight.numpy(force=True) for layer in surgery.linears(lab.model()).values()]
    return [METHODS[method](weight[~outlier_mask(weight)].astype(float), bits)[1] for weight in weights]


def picture(found: dict[str, dict[int, dict[str, float]]], ours: list[float], theirs: list[float]) -> Figure:
    """Left: the absolute error of one layer while centroids move, and where GOBO stops. Right: what bits buy."""
    fig, (left, right) = panels(2, width=8.4, height=3.2)
    left.plot(theirs, color=COLOURS["second"], label="K-means, to its end")
    left.plot(np.argmin(ours), min(ours), "o", color=COLOURS["method"], label="GOBO")
    left.set(xlabel="moves of the centroids", ylabel="absolute error of one layer")
    for rival, by_bits in found.items():
        bits, rises = ([each[key] for each in by_bits.values()] for key in ("bits", "rise"))
        right.plot(bits, rises, **series(RIVALS[rival][2]), label=rival)
    right.set(xlabel="bits per weight", ylabel="rise of perplexity", yscale="log")
    right.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    for axes in (left, right):
        legend(axes)
    return fig


def claim(lab: Lab) -> Claim:
    """At 3 bits GOBO loses less than plain rounding, and finds centroids sooner than K-means, at no more error."""
    widths = (2, 3, 4, 5) if lab.full else (3, 4)
    found = {rival: {bits: measure(lab, rival, bits) for bits in widths} for rival in RIVALS}
    rise = {rival: by_bits[3]["rise"] for rival, by_bits in found.items()}
    ours, theirs = searches(lab, "l1", 3), searches(lab, "kmeans", 3)
    steps, all_steps = (sum(len(errors) - 1 for errors in each) for each in (ours, theirs))
    error = sum(min(errors) for errors in ours) / sum(errors[-1] for errors in theirs)
    sentence = (
        f"At 3 bits GOBO raises perplexity {lab.base_perplexity:.2f} by {rise['GOBO']:.2f}, plain rounding of whole "
        f"layers by {rise['plain rounding']:.2f}; its centroids stop after {steps} moves, those of K-means after "
        f"{all_steps} (rise {rise['K-means']:.2f}), at {100 * error:.1f}% of the absolute error of K-means."
    )
    numbers = {"perplexity, full precision": lab.base_perplexity, "absolute error over that of K-means": error}
    numbers |= {"moves, GOBO": steps, "moves, K-means": all_steps}
    for rival, by_bits in found.items():
        numbers |= {f"{key}, {rival} {bits} bits": each[key] for bits, each in by_bits.items() for key in each}
    holds = rise["GOBO"] < rise["plain rounding"] and steps < all_steps and error <= 1.01
    setting = f"all blocks, one codebook a matrix, threshold {THRESHOLD:g}; nothing is drawn, seeds change nothing"
    longest = max(zip(ours, theirs, strict=True), key=lambda both: len(both[1]))
    return Claim(sentence, holds, numbers, picture(found, *longest), setting)
