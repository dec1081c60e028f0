"""Uniform quantization: write each number as a small integer times a step that it shares with its neighbours.

    code = rint(x / scale) + zero, clipped to 0 .. 2^bits − 1                     value = scale · (code − zero)

What is not clipped moves by half a step at most, and the step is set by the largest of the numbers that share it. Three
choices decide about it:

which share    a group of n neighbours has one grid: the whole tensor, a row (an output channel of a weight, a token of
               activations: the same cut), or a part of a row. One outlier makes the grid of its whole group coarse.
where it lies  asymmetric: from the least number to the greatest, 0 always between them. Symmetric: 0 in the middle;
               for its step five rules are in use, see `grid`.
when           weights once, from themselves. Activations as they come (dynamic), or from sample text (static).

Saves    bytes: bits + (16 + bits) / n per number instead of 16, with a 16-bit scale and a zero per group (symmetric:
         no zero). Integer products, too, where the scale can be taken out of the sum: a row's can, a group's cannot.
Costs    half a step of error, and the step doubles with every bit that is saved.
Paper    Krishnamoorthi 2018, arXiv:1806.08342, section 2. The symmetric steps: the code of GPTQ, torch.ao, SmoothQuant
         and LLM.int8, DeepSpeed, torchao.
Follows  torch: ties go to the even number, before zero is added; x · (1 / scale) stands for the quotient, in the
         precision of x; zero is one of the codes. Codes are unsigned on symmetric grids, too: code − zero is the signed
         one. A group of nothing but zeros takes scale 1 and becomes zeros again.
Symbols  x `[rows, columns]`, cut as `x.reshape(-1, n)`; scale, zero `[groups]`; codes like x; packed `[rows, bytes]`.
Kernel   kernels/quantization/uniform.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from minitfm import surgery
from minitfm.model import Transformer

GRANULARITIES = ("tensor", "channel", "token", "group")
SYMMETRIC = {  # by how many steps the greatest and the least value miss 2^(bits − 1) steps from 0
    "gptq": (0.5, 0.5),
    "torch": (0.5, 0.5),
    "smoothquant": (1, 1),
    "deepspeed": (0, 0),
    "no_clipping": (1, 0),
}
SCHEMES = ("asymmetric", *SYMMETRIC)


def checked(x: np.ndarray, bits: int) -> np.ndarray:
    """x as float32, or as float64 where that would lose digits.

    Raises ValueError for an x that is empty or not finite, and for bits outside 1 .. 8.
    """
    x = np.asarray(x)
    x = x.astype(np.result_type(x, np.float32), copy=False)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"x must be finite and not empty, got shape {x.shape}, {(~np.isfinite(x)).sum()} not finite")
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    return x


def sharing(shape: tuple[int, ...], granularity: str, group_size: int | None = None) -> int:
    """How many neighbours share a grid: `x.reshape(-1, sharing(x.shape, …))` has one grid per row.

    "tensor": all; "channel" (of a weight `[out, in]`) and "token" (of activations `[…, in]`): a row; "group":
    group_size. Raises ValueError for another granularity, and for a group_size that does not divide the row, is missing
    with "group", or comes with anything else.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if granularity != "group" and group_size is not None:
        raise ValueError(f"group_size belongs to the granularity 'group', got {group_size} with {granularity!r}")
    if granularity == "group" and (group_size is None or group_size < 1 or shape[-1] % group_size):
        raise ValueError(f"group_size must divide the {shape[-1]} columns, got {group_size}")
    return int(np.prod(shape)) if granularity == "tensor" else group_size or shape[-1]


def reach(bits: int, scheme: str) -> tuple[float, float]:
    """Steps from 0 to the greatest and to the least value by a symmetric scheme. ValueError unless both are some."""
    if scheme not in SYMMETRIC:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    up, down = (2 ** (bits - 1) - short for short in SYMMETRIC[scheme])
    if up == 0:
        raise ValueError(f"scheme {scheme!r} needs at least 2 bits: with {bits} it has no value above 0")
    return up, down


def grid(low: np.ndarray, high: np.ndarray, bits: int, scheme: str = "asymmetric") -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero) of grids with 2**bits codes for numbers from low to high, one for each group.

    low <= 0 <= high: float32 or float64 arrays of one shape and dtype, which the results share; zero holds integers.
    "asymmetric": scale = (high − low) / (2**bits − 1), and zero = −low / scale, rounded, ties to even: a code.
    The others have zero = h = 2**(bits−1) and, with a = max(high, −low),

        "gptq"         a / (h − ½), but where low is 0 high / (2h − 1), as released: the upper half is then clipped
        "torch"        a / (h − ½): a is clipped, and −a falls between two codes
        "smoothquant"  a / (h − 1): nothing is clipped, and code 0 is never used; needs 2 bits
        "deepspeed"    a / h: a is clipped by a whole step
        "no_clipping"  the larger of high / (h − 1) and −low / h; needs 2 bits

    A scale below the least normal number of its dtype, 0 among them, becomes 1. Raises ValueError for another scheme,
    bits outside 1 .. 8 or too few, ranges that are empty, not finite or without 0, and a scale that overflows.
    """
    low, high = checked(low, bits), checked(high, bits)
    if (low > 0).any() or (high < 0).any():
        raise ValueError(f"need low <= 0 <= high, got low up to {low.max()} and high from {high.min()}")
    with np.errstate(over="ignore"):
        if scheme == "asymmetric":
            scale = (high - low) / (2**bits - 1)
        else:
            up, down = reach(bits, scheme)
            widest = np.where(low < 0, high, high / 2) if scheme == "gptq" else high
            scale = np.maximum(widest / up, -low / down)
    if not np.isfinite(scale).all():
        raise ValueError(f"the range from {low.min()} to {high.max()} is too wide for {scale.dtype}")
    scale = np.where(scale < np.finfo(scale.dtype).tiny, scale.dtype.type(1), scale)
    if scheme == "asymmetric":
        return scale, np.rint(abs(low) / scale)
    return scale, np.full_like(scale, 2 ** (bits - 1))


def quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Nearest codes, uint8 in the shape of x; scale and zero, which holds integers, broadcast to it.

    x · (1 / scale) is rounded, halves to the even number; then zero is added, and the sum clipped to 0 .. 2**bits − 1,
    however large it is. All in the precision of the arguments, at least float32; they are not modified.
    Raises ValueError for an x that is empty or not finite, and for bits outside 1 .. 8.
    """
    with np.errstate(over="ignore"):  # what is far beyond the grid is clipped like the rest
        return np.clip(np.rint(checked(x, bits) * (np.float32(1) / scale)) + zero, 0, 2**bits - 1).astype(np.uint8)


def dequantize(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """scale · (code − zero) in the dtype of scale; scale and zero broadcast to codes."""
    return scale * (codes.astype(scale.dtype) - zero.astype(scale.dtype))


def running_range(batches: Iterable[np.ndarray], momentum: float | None = None) -> tuple[float, float]:
    """Static parameters: the range (low, high), for `grid`, of sample batches of any shape.

    momentum None: the least and the greatest number of all. Otherwise the extremes of the first batch, which every
    later batch moves by this share of the way to its own: low += momentum · (its least − low). Then 0 is included, at
    the very end. Computed in float64. Raises ValueError for no batches, an empty one, one that is not finite, and
    momentum outside 0 < momentum <= 1. Source: torch.ao, MinMaxObserver and MovingAverageMinMaxObserver.
    """
    if momentum is not None and not 0 < momentum <= 1:
        raise ValueError(f"momentum must be None, or above 0 and at most 1, got {momentum}")
    ends = np.array([(np.min(x), np.max(x)) for x in (checked(batch, 8) for batch in batches)], dtype=np.float64)
    if len(ends) == 0:
        raise ValueError("batches must hold at least one: static parameters need calibration data")
    low, high = ends[:, 0].min(), ends[:, 1].max()
    if momentum is not None:
        low, high = reduce(lambda now, new: now + momentum * (new - now), ends)
    return min(float(low), 0.0), max(float(high), 0.0)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes below 2**bits, integers `[…, n]` -> uint8 `[…, n · bits / 8]`: bit after bit, none left out.

    Bit j of a row is bit j % 8 of byte j // 8, the lowest bit first, and code i is bits i · bits to (i + 1) · bits − 1.
    So a byte holds four codes of 2 bits or two of 4, the earlier lower; 32 codes of 3 bits are three 32-bit words, low
    byte first, and codes 10 and 21 lie across their borders. Works for any number of bits.
    Raises ValueError for codes that are none, not integers or out of range, bits outside 1 .. 8, and rows that do not
    fill whole bytes: n · bits must be a multiple of 8.
    """
    checked(codes, bits)
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= 2**bits:
        raise ValueError(f"codes must be integers below 2**{bits}, got {codes.dtype}, {codes.min()} to {codes.max()}")
    if codes.shape[-1] * bits % 8:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes")
    stream = codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1  # […, n, bits]
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `pack`: uint8 `[…, bytes]` -> codes, uint8 `[…, 8 · bytes / bits]`. ValueError if a code is cut."""
    checked(packed, bits)
    if packed.dtype != np.uint8 or packed.shape[-1] * 8 % bits:
        raise ValueError(f"packed must be uint8 with whole codes of {bits} bits, got {packed.dtype} {packed.shape}")
    stream = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)


def on_grids(
    x: np.ndarray, bits: int, granularity: str, group_size: int | None, scheme: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of x on dynamic grids, `[groups, n]`, and their scale and zero `[groups, 1]`. Errors as its parts."""
    x = checked(x, bits)
    groups = x.reshape(-1, sharing(x.shape, granularity, group_size))
    low, high = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0)
    scale, zero = (part[:, None] for part in grid(low, high, bits, scheme))
    return quantize(groups, scale, zero, bits), scale, zero


def rounded(
    x: np.ndarray, bits: int, granularity: str, group_size: int | None = None, scheme: str = "asymmetric"
) -> np.ndarray:
    """The values of x, of any shape, on dynamic grids: what is called fake quantization. Errors as `on_grids`."""
    return dequantize(*on_grids(x, bits, granularity, group_size, scheme)).reshape(np.shape(x))


def quantize_and_pack(
    x: np.ndarray, bits: int, group_size: int | None = None, scheme: str = "asymmetric"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes of x `[rows, columns]` on dynamic grids, one for each group of a row, or (None) for each row.

    Returns packed uint8 `[rows, columns · bits / 8]`; scale (float32, for a float64 x float64) and zero (uint8), both
    `[rows, groups]`. The kernel of this name does it in one pass. Raises ValueError as `on_grids` and `pack`.
    """
    codes, scale, zero = on_grids(x, bits, "channel" if group_size is None else "group", group_size, scheme)
    return pack(codes.reshape(x.shape), bits), scale.reshape(len(x), -1), zero.reshape(len(x), -1).astype(np.uint8)


def to_codes(x: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_and_pack` of x `[rows, columns]`, a grid per row: on CUDA by the kernel, elsewhere by the reference."""
    if x.is_cuda:
        from kernels.quantization.uniform import quantize_and_pack as kernel

        return kernel((x.float() if x.dtype is torch.float64 else x).contiguous(), bits, None, scheme)
    packed, scale, zero = map(torch.from_numpy, quantize_and_pack(x.float().numpy(), bits, None, scheme))
    return packed, scale, zero


def to_values(packed: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What `to_codes` made, as numbers again: float32 `[rows, columns]`."""
    places = torch.arange(8, device=packed.device)
    stream = (packed[..., None] >> places & 1).flatten(1).unflatten(1, (-1, bits))  # [rows, columns, bits]
    return scale * ((stream << places[:bits]).sum(-1) - zero.long())


class RoundedInput(nn.Module):
    """A layer that sees its input x `[…, in]` on a grid of `bits` (on CUDA, dynamic: 2, 3, 4 or 8).

    span    static: (low, high) of one grid for all that comes, clipped to it. None: dynamic, each token has its own
    Gradients pass as if x were not rounded, but not to what was clipped.
    """

    def __init__(self, layer: nn.Module, bits: int, span: tuple[float, float] | None, scheme: str) -> None:
        """ValueError as `grid` raises it."""
        super().__init__()
        self.layer, self.bits, self.scheme, self.span = layer, bits, scheme, span
        low, high = np.array(span or (0, 0), np.float32)[:, None]
        (scale,), (zero,) = grid(low, high, bits, scheme)
        self.static = float(scale), int(zero), 0, 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of the rounded x."""
        if self.span is not None:
            return self.layer(torch.fake_quantize_per_tensor_affine(x, *self.static))
        held = to_values(*to_codes(x.detach().reshape(-1, x.shape[-1]), self.bits, self.scheme), self.bits)
        return self.layer(held.view_as(x).to(x.dtype) + (x - x.detach()))  # + 0, which carries the gradient


def round_inputs(model: Transformer, bits: int, tokens: Tensor | None = None, scheme: str = "asymmetric") -> None:
    """Round what every block linear reads, in place: dynamic, or static by the ranges that tokens `[N, T]` give."""
    layers = surgery.linears(model)
    seen: dict[str, list] = {name: [] for name in layers}
    if tokens is not None:
        for name, x in surgery.record_inputs(model, tokens, list(layers)):
            seen[name].append(torch.stack(torch.aminmax(x)).float().cpu().numpy())
    for name, layer in layers.items():
        span = None if tokens is None else running_range(seen[name])
        surgery.replace(model, name, RoundedInput(layer, bits, span, scheme))


@torch.no_grad()
def round_weights(model: Transformer, seed: int = 0, **choice: Any) -> None:
    """Round the weights of all block linears in place, by `rounded` with the arguments in choice; errors as there.

    A seed other than 0 draws the order in which columns are cut into groups: in a network that is an accident.
    """
    for layer in surgery.linears(model).values():
        order = np.random.default_rng(seed).permutation(layer.in_features) if seed else np.arange(layer.in_features)
        values = rounded(layer.weight.numpy(force=True)[:, order], **choice)
        layer.weight[:, order] = torch.from_numpy(values).to(layer.weight)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run uniform`."""
    parser.add_argument("--bits", type=int, default=4, help="1 to 8 (default 4)")
    parser.add_argument("--granularity", choices=("tensor", "channel", "group"), default="group", help="default: group")
    parser.add_argument("--group-size", type=int, metavar="G", help="columns that share a grid (default 32)")
    parser.add_argument("--scheme", choices=SCHEMES, default="asymmetric", help="default: asymmetric")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Round the weights, which needs no calibration tokens; bits per weight as the first lines of this file count."""
    size = 32 if args.granularity == "group" and args.group_size is None else args.group_size
    shapes = [layer.weight.shape for layer in surgery.linears(model).values()]
    groups = sum(shape.numel() // sharing(shape, args.granularity, size) for shape in shapes)
    round_weights(model, bits=args.bits, granularity=args.granularity, group_size=size, scheme=args.scheme)
    held = 16 + args.bits if args.scheme == "asymmetric" else 16  # bits of a group's scale and zero
    return {"bits per weight": args.bits + held * groups / sum(shape.numel() for shape in shapes)}


def picture(grids: dict[str, list[float]], steps: dict[str, float], base: float, widths: tuple[int, ...]) -> Figure:
    """Perplexity by who shares a grid, and by the rule for a symmetric step."""
    fig, (left, right) = panels(2, width=8.0)
    for role, (words, found) in zip(("baseline", "second", "method"), grids.items(), strict=True):
        left.plot(widths, found, **series(role), label=words)
    left.axhline(base, **series("reference"), label="full precision")
    left.set(xlabel="bits per code", ylabel="perplexity", yscale="log", xticks=widths, title="asymmetric")
    left.yaxis.set(major_formatter="{x:.0f}", minor_formatter="{x:.0f}" if len(widths) < 3 else "")
    legend(left)
    right.barh(list(steps), [value - base for value in steps.values()], color=COLOURS["method"])
    right.set(xlabel="rise of perplexity", title="symmetric, 3 bits, per channel")
    return fig


def perplexity(lab: Lab, bits: int, scheme: str, granularity: str, group_size: int | None) -> float:
    """Perplexity of the model with rounded weights; in groups the highest of all seeds."""
    found = []
    for seed in lab.seeds if group_size else (0,):
        model = lab.model()
        round_weights(model, seed, bits=bits, scheme=scheme, granularity=granularity, group_size=group_size)
        found.append(lab.perplexity(model))
    return max(found)


def claim(lab: Lab) -> Claim:
    """At 4 bits and at 3 smaller groups cost less, and at 3 who shares a grid matters more than where it lies."""
    size = math.gcd(32, *(layer.in_features for layer in surgery.linears(lab.model()).values()))
    cuts = {"per tensor": ("tensor", None), "per channel": ("channel", None), f"in groups of {size}": ("group", size)}
    widths, base = (4, 3, 2) if lab.full else (4, 3), lab.base_perplexity
    cut = {(bits, words): perplexity(lab, bits, "asymmetric", *cuts[words]) for bits in widths for words in cuts}
    step = {(bits, s): perplexity(lab, bits, s, "channel", None) for bits in widths[1:] for s in SYMMETRIC}
    falls = all(cut[bits, finer] < cut[bits, words] for bits in (4, 3) for words, finer in pairwise(cuts))
    best, *_, worst = sorted(SYMMETRIC, key=lambda scheme: step[3, scheme])
    wider = max(cut[3, words] for words in cuts) - min(cut[3, words] for words in cuts) > step[3, worst] - step[3, best]
    rises = ", ".join(f"{cut[3, words] - base:.1f} {words}" for words in cuts)
    sentence = (
        f"Grids of fewer weights {'cost' if falls else 'do not always cost'} less at 4 bits and at 3, where perplexity "
        f"{base:.1f} rises by {rises}; the rule for a symmetric step makes {'less' if wider else 'more'} difference, "
        f"per channel from {step[3, best] - base:.1f} ({best}) to {step[3, worst] - base:.1f} ({worst})."
    )
    numbers = {f"perplexity, {bits} bits, {words}": value for (bits, words), value in (cut | step).items()}
    numbers["perplexity, full precision"] = base
    setting = f"weights of all blocks; groups: the worst of seeds {lab.seeds}, which reorder columns (0: as stored)"
    found = {words: [cut[bits, words] for bits in widths] for words in cuts}
    figure = picture(found, {scheme: step[3, scheme] for scheme in SYMMETRIC}, base, widths)
    return Claim(sentence, falls and wider, numbers, figure, setting, infinite=tuple(numbers))
