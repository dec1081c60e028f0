"""LLM.int8: multiply nearly everything in 8 bits, and the few columns that hold an outlier in 16.

    outliers = columns in which any token has |x| ≥ threshold           (6 in the paper)
    x_max[token] = max |x[token, column]| over the numbers below threshold; w_max[row] = max |w[row, column]|
    x₈ = rint(127 x / x_max), 0 in the columns of outliers;             w₈ = rint(127 w / w_max)
    y = x_max w_max / 127² · (x₈ w₈ᵀ)  +  x[outliers] · w[outliers]ᵀ

Every row of x and every row of w has a scale of its own, so a row of x that holds an outlier would be rounded to the
outlier's step, in which its other numbers vanish. From about 6.7 billion parameters on, language models have such
outliers in every layer and nearly every token, but always in the same few columns.

Saves    half the bytes of 16-bit weights, and for many tokens arithmetic: int8 products run at twice the rate.
Costs    two passes over x, a second product for the outliers, and that tokens are no longer computed one by one: which
         columns are outliers depends on the whole batch. The same token is rounded differently in other company, in a
         prompt by tokens that come after it, and prefill and decode differ.
Paper    Dettmers, Lewis, Belkada, Zettlemoyer 2022, arXiv:2208.07339, section 3.
Follows  bitsandbytes: |x| ≥ threshold (the paper: >), codes by float32 arithmetic as x · (127 / x_max), threshold 0 for
         none, and the outliers' weights from their codes, w₈ w_max / 127. `exact` is the paper's variant, in which they
         are the weights before rounding; it holds both, 3 bytes a weight. Other than the library: x is not converted
         to float16 first, and rows of zeros, which it leaves undefined, have x_max = 0 and codes 0. Numbers that are
         not finite are outliers, so that they reach the result as in a plain product.
Symbols  x `[tokens, in]`; codes (of w) `[out, in]` int8; absmax (of w) `[out]`; y `[tokens, out]`.
Kernel   kernels/quantization/llm_int8.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from minitfm import evaluate, surgery
from minitfm.model import Transformer

LEAST = np.float32(2.0**-119)  # 127 / a smaller maximum is too large for float32
THRESHOLD, BATCH = 6.0, 16  # the paper's; sequences that a perplexity is measured on at once
CHANNELS, FACTOR = 2, 64  # outlier channels that the claim plants: a power of two changes no product


def quantize_rows(x: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Int8 codes of each row of x `[rows, columns]`, but for its outlier columns.

    codes     int8 `[rows, columns]`: x · (127 / absmax of the row), rounded half to even; 0 in outlier columns
    absmax    float32 `[rows]`: the largest magnitude below threshold in all columns, outlier columns among them. One
              below 2^−119 counts as 0, and then the codes of the row are 0
    outliers  int64, rising: the columns in which any row has a magnitude of threshold or more, or what is not finite.
              Threshold 0 stands for infinity

    x, threshold, both divisions and products are float32, to which x of any dtype is converted. Source: bitsandbytes,
    `int8_vectorwise_quant`. Raises ValueError unless x is a non-empty matrix and threshold 0 or more.
    """
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x must be a non-empty [rows, columns] matrix, got shape {x.shape}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 or more, got {threshold}")
    with np.errstate(over="ignore"):
        x, limit = x.astype(np.float32), np.float32(threshold or np.inf)
    regular = np.abs(x) < limit  # false for NaN
    absmax = np.abs(np.where(regular, x, 0)).max(axis=1)
    absmax[absmax < LEAST] = 0
    kept = regular.all(axis=0)
    coded = np.where(kept & (absmax > 0)[:, None], x, 0)
    inverse = np.float32(127) / np.maximum(absmax, LEAST)
    return np.rint(coded * inverse[:, None]).astype(np.int8), absmax, np.flatnonzero(~kept)


def llm_int8_matmul(
    x: np.ndarray, codes: np.ndarray, absmax: np.ndarray, threshold: float = 6.0, exact: np.ndarray | None = None
) -> np.ndarray:
    """x `[tokens, in]` times the transpose of the weights codes · absmax / 127: float64 `[tokens, out]`.

    codes int8 `[out, in]` and absmax `[out]` as `quantize_rows` makes them. x without its outlier columns is quantized
    by `quantize_rows` and multiplied in int8; to that is added the product of the outlier columns, not rounded, with
    the weights that the codes stand for, or with those of `exact` `[out, in]` if it is given.

    Integers are summed exactly; scales are applied, and outliers multiplied, in float64. This is the kernel's
    reference. Raises ValueError if the shapes do not fit together, and as `quantize_rows`.
    """
    fitting = codes.ndim == 2 and x.shape[1:] == codes.shape[1:] and absmax.shape == codes.shape[:1]
    if not fitting or (exact is not None and exact.shape != codes.shape):
        raise ValueError(
            f"x {x.shape}, codes {codes.shape}, absmax {absmax.shape} and "
            f"exact {None if exact is None else exact.shape} do not fit together"
        )
    x_codes, x_absmax, outliers = quantize_rows(x, threshold)
    scale = absmax.astype(np.float64) / 127  # [out]
    sums = x_codes.astype(np.float64) @ codes.T.astype(np.float64)  # whole numbers far below 2^53
    y = sums * (x_absmax[:, None].astype(np.float64) / 127 * scale)
    weight = codes[:, outliers] * scale[:, None] if exact is None else exact[:, outliers].astype(np.float64)
    return y + x[:, outliers].astype(np.float64) @ weight.T


def by_operators(x: Tensor, codes: Tensor, absmax: Tensor, threshold: float, exact: Tensor | None) -> Tensor:
    """`llm_int8_matmul` by torch operators, in float32 (float64 if x is); sums of 1040 products of codes are exact."""
    regular = x.float().abs() < (threshold or math.inf)
    x_absmax = torch.where(regular, x.float(), 0).abs().amax(dim=1, keepdim=True)
    x_absmax = torch.where(x_absmax < LEAST.item(), 0, x_absmax)
    kept = regular.all(dim=0)
    inverse = torch.where(x_absmax > 0, 127 / x_absmax, 0)
    x_codes = torch.round(torch.where(kept, x.float(), 0) * inverse)
    precise = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x_codes.to(precise), codes.to(precise)) * (x_absmax * (absmax / 127**2))
    outliers = (~kept).nonzero().flatten()
    weight = codes[:, outliers] * (absmax / 127)[:, None] if exact is None else exact[:, outliers]
    return (y + F.linear(x[:, outliers].to(precise), weight.to(precise))).to(x.dtype)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights that rounds what it is given: x `[..., in]` -> `[..., out]`. Not for training.

    In its state dict is a plain layer's `weight`, the numbers that the codes stand for, so that a model that holds such
    layers is saved as any other. Who loads that gets the rounded weights; activations are rounded by this layer only.
    """

    def __init__(self, linear: nn.Linear, threshold: float = THRESHOLD, exact: bool = False) -> None:
        """Quantize `linear`; with `exact` hold its weights, too, in their own dtype, for the columns of outliers.

        Raises ValueError for weights that are not finite and a threshold that is not 0 or more.
        """
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"threshold must be 0 or more, got {threshold}")
        weight = linear.weight.detach()
        codes, absmax, refused = quantize_rows(weight.double().numpy(force=True))
        if len(refused):
            raise ValueError(f"weight must be finite in float32, columns {refused.tolist()[:5]} are not")
        self.codes = nn.Buffer(torch.from_numpy(codes).to(weight.device), persistent=False)
        self.absmax = nn.Buffer(torch.from_numpy(absmax).to(weight.device), persistent=False)
        self.exact = nn.Buffer(weight.clone(), persistent=False) if exact else None
        self.bias, self.threshold, self.dtype = linear.bias, threshold, weight.dtype

    def weight(self) -> Tensor:
        """What the codes stand for, `[out, in]`, in the dtype of the layer that was quantized."""
        return (self.codes * (self.absmax / 127)[:, None]).to(self.dtype)

    def bits(self) -> float:
        """Bits per weight: codes, scales, and 16 for a weight that is held besides its code."""
        return 8 * (self.codes.nbytes + self.absmax.nbytes) / self.codes.numel() + (0 if self.exact is None else 16)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x in any floating dtype; the result has the same. All leading axes together are the batch."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        exact = None if self.exact is None else self.exact.to(x.dtype)
        if not x.is_cuda or x.dtype is torch.float64:
            out = by_operators(rows, self.codes, self.absmax, self.threshold, exact)
        else:
            from kernels.quantization.llm_int8 import llm_int8_matmul as kernel

            out = kernel(rows, self.codes, self.absmax, self.threshold, exact)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(x.dtype)


class AbsmaxLinear(nn.Module):
    """What LLM.int8 improves upon: x and weights rounded to 8 bits, each with scales for its rows or with one scale."""

    def __init__(self, linear: nn.Linear, x_rows: bool, weight_rows: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.x_rows = nn.Parameter(rounded(linear.weight, weight_rows)), linear.bias, x_rows

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`."""
        return F.linear(rounded(x, self.x_rows), self.weight, self.bias)


@torch.no_grad()
def rounded(x: Tensor, rows: bool) -> Tensor:
    """x `[..., columns]` to the nearest of 255 values between ± its largest magnitude, in each row or in all of x."""
    largest = x.abs().amax(dim=-1, keepdim=True) if rows else x.abs().amax()
    step = largest.clamp(min=LEAST.item()) / 127
    return torch.round(x / step) * step


def replace_each(model: Transformer, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put make(layer) in the place of every linear layer of the blocks."""
    for name, layer in surgery.linears(model).items():
        surgery.replace(model, name, make(layer))


def held_bits(layers: Iterable[nn.Module]) -> float:
    """Bits per weight of the `Int8Linear` among `layers`."""
    held = [layer for layer in layers if isinstance(layer, Int8Linear)]
    return sum(layer.bits() * layer.codes.numel() for layer in held) / sum(layer.codes.numel() for layer in held)


def outlier_share(model: Transformer, tokens: Tensor, threshold: float) -> float:
    """Share of the input columns of the block linears, all batches of 16 sequences counted, that hold an outlier."""
    found = total = 0
    for _, x in surgery.record_inputs(model, tokens, list(surgery.linears(model)), BATCH):
        found += int((x.abs() >= threshold).flatten(0, -2).any(dim=0).sum())
        total += x.shape[-1]
    return found / total


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run llm_int8`."""
    parser.add_argument("--threshold", type=float, default=THRESHOLD, metavar="T", help="0: no outliers (default 6)")
    parser.add_argument("--exact", action="store_true", help="outliers meet weights that are not rounded (the paper)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Int8 layers; `tokens` only serve to count outlier columns. What is saved of them is said in `Int8Linear`."""
    share = outlier_share(model, tokens, args.threshold or math.inf)
    replace_each(model, lambda layer: Int8Linear(layer, args.threshold, args.exact))
    report = {"bits per weight": held_bits(model.modules()), f"outlier columns, batches of {BATCH}": f"{share:.2%}"}
    return report | {"a saved model has": "weights rounded to int8, activations not rounded"}


METHODS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "one scale each": lambda layer: AbsmaxLinear(layer, x_rows=False, weight_rows=False),
    "rows of x": lambda layer: AbsmaxLinear(layer, x_rows=True, weight_rows=False),
    "vector-wise": lambda layer: Int8Linear(layer, 0.0),
    "LLM.int8, library": Int8Linear,
    "LLM.int8, paper": lambda layer: Int8Linear(layer, exact=True),
}


def planted(lab: Lab, seed: int) -> Transformer:
    """The base model with outlier channels planted; it computes the same."""
    model = lab.model()
    surgery.plant_outliers(model, CHANNELS, FACTOR, seed)
    return model


def rise(lab: Lab, seed: int, text: Tensor, make: Callable[[nn.Linear], nn.Module]) -> float:
    """How much perplexity rises when `make` replaces the layers of the planted model."""
    model = planted(lab, seed)
    replace_each(model, make)
    return evaluate.perplexity(model, text, BATCH) - plain_perplexity(lab, text)


def plain_perplexity(lab: Lab, text: Tensor) -> float:
    """That of the base model on `text`."""
    return lab.once(("llm_int8, perplexity", len(text)), lambda: evaluate.perplexity(lab.model(), text, BATCH))


def sweep(lab: Lab, text: Tensor) -> dict[str, list[float]]:
    """For each threshold the rise of both variants, and the share of outlier columns."""
    found: dict[str, list[float]] = {"threshold": [1, 2, 4, 6, 12, 24, 48, 96] if lab.full else [2, 6, 24, 96]}
    for words, exact in (("library", False), ("paper", True)):
        makers = [partial(Int8Linear, threshold=t, exact=exact) for t in found["threshold"]]
        found[words] = [rise(lab, 0, text, make) for make in makers]
    found["share"] = [outlier_share(planted(lab, 0), text, t) for t in found["threshold"]]
    return found


def picture(swept: dict[str, list[float]], without: float) -> Figure:
    """The rise of perplexity by the threshold, and the share of columns that it makes outliers."""
    fig, (left, right) = panels(2, width=9.0)
    ends = [swept["threshold"][0], swept["threshold"][-1]]
    left.plot(ends, [without, without], **series("reference"), label="no outlier columns")
    left.plot(swept["threshold"], swept["library"], **series("baseline"), label="library: from int8")
    left.plot(swept["threshold"], swept["paper"], **series("method"), label="paper: 16 bits")
    left.set(ylabel="rise of perplexity", title="weights of outlier columns")
    legend(left)
    right.plot(swept["threshold"], [100 * share for share in swept["share"]], **series("accent"))
    right.set(ylabel="outlier columns, %", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="threshold", xscale="log")
        axes.set_xticks(swept["threshold"], [f"{t:g}" for t in swept["threshold"]])
        axes.set_xticks([], minor=True)
    return fig


def claim(lab: Lab) -> Claim:
    """Where channels are outliers, rounding to 8 bits breaks the model, and LLM.int8 does not."""
    text = lab.validation[:: math.ceil(len(lab.validation) / 128)]  # 128 sequences at most
    rises = {words: [rise(lab, seed, text, make) for seed in lab.seeds] for words, make in METHODS.items()}
    mean = {words: float(np.mean(each)) for words, each in rises.items()}
    share = float(np.mean([outlier_share(planted(lab, seed), text, THRESHOLD) for seed in lab.seeds]))
    lost = mean["vector-wise"]
    holds = share < 0.1 and mean["LLM.int8, paper"] < 0.1 * lost and mean["LLM.int8, library"] < 0.5 * lost
    sentence = (
        f"With {CHANNELS} outlier channels planted, W8A8 raises perplexity by {mean['one scale each']:.2f} with one "
        f"scale each, by {lost:.2f} with scales for all rows; LLM.int8 by {mean['LLM.int8, paper']:.2f} with the "
        f"{share:.1%} of columns that hold outliers in full precision, by {mean['LLM.int8, library']:.2f} if their "
        f"weights come from int8, as in the library{'' if holds else ': not as in the paper'}."
    )
    swept = sweep(lab, text)
    numbers = {"perplexity, full precision": plain_perplexity(lab, text)}
    numbers |= {f"rise, {words}": value for words, value in mean.items()} | {"share of outlier columns": share}
    for words in ("library", "paper", "share"):
        numbers |= {f"{words}, threshold {t:g}": v for t, v in zip(swept["threshold"], swept[words], strict=True)}
    setting = f"{CHANNELS} channels planted × {FACTOR} (small models grow none), threshold {THRESHOLD:g}, batches of "
    setting += f"{BATCH} sequences, {len(text)} in all; means over planting seeds {lab.seeds}, the sweep with the first"
    return Claim(sentence, holds, numbers, picture(swept, rises["vector-wise"][0]), setting)
