"""LUT-GEMM: a weight is a sum of a few signed scales; x meets planes of signs, and eight signs at once are one look-up.

    weight[row, k] = Σ_p alpha[row, group, p] · sign[row, k, p]  (+ offset[row, group])          sign = −1 or +1
    y[row] = Σ_group Σ_p alpha[row, group, p] · (Σ_k sign[row, k, p] · x[k])  (+ offset[row, group] · Σ_k x[k])

Binary-coding quantization (BCQ) with p planes offers 2^p values that need not be evenly spaced. Greedily, each plane
takes the signs of what is left and the mean of its sizes. Alternating then improves the scales for given signs (least
squares) and the signs for given scales (nearest value), in turn. A uniform grid is BCQ, too: scales s/2, s, 2s ..

Saves    bytes: p (1 + 16 / g) bits per weight in groups of g, of the 16 of plain layers. Operations: of eight
         activations there are 256 signed sums. Tabled once, they turn eight multiply-adds of a row into one look-up per
         plane: p K N / 8 look-ups for 2 K N operations, and 64 K additions for the tables, which all N rows share.
Costs    p scales per group, and tables that must lie in fast memory. Alternating is solved offline, for each group.
Paper    Park et al. 2022, arXiv:2206.09557, sections 3.1 (BCQ, uniform as BCQ) and 3.2 (tables). Greedy and alternating
         quantization: Xu et al. 2018, arXiv:1802.00150.
Follows  the released code (naver-aics/lut-gemm): 15 rounds, scales made positive and sorted, largest first, ties
         between two values to the upper one. Two differences: least squares are solved exactly, where that code takes
         as many steps of conjugate gradients as there are planes; and the sign of 0 is +1, where that code leaves a 0,
         for which a bit has no room.
Symbols  signs `[out, in, planes]`; alpha `[out, groups, planes]`; offset `[out, groups]`; packed as in `pack`;
         x `[tokens, in]`; y `[tokens, out]`.
Kernel   kernels/quantization/lut_gemm.py
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import legend, panels, series
from chapters.lab import Lab
from chapters.quantization.gptq import round_to_nearest
from chapters.quantization.weight_only import Quantized, checked, quantize_each
from minitfm import surgery
from minitfm.model import Transformer

ROUNDS = 15  # of the released code
METHODS = {"uniform": "baseline", "greedy": "second", "alternating": "method"}  # and how each is drawn


@dataclass(frozen=True)
class BinaryCoded:
    """A weight matrix as signed scales, in groups of in / groups neighbouring columns.

    signs   `[out, in, planes]` int8, −1 or +1
    alpha   `[out, groups, planes]` float64, not negative
    offset  `[out, groups]` float64, zero but for uniform grids
    """

    signs: np.ndarray
    alpha: np.ndarray
    offset: np.ndarray

    def dequantize(self) -> np.ndarray:
        """The weights that signs and scales stand for, float64 `[out, in]`."""
        rows, groups, planes = self.alpha.shape
        values = self.signs.reshape(rows, groups, -1, planes) @ self.alpha[..., None]  # [out, groups, size, 1]
        return (values[..., 0] + self.offset[..., None]).reshape(rows, -1)


def greedy(weight: np.ndarray, bits: int, group_size: int | None = None) -> BinaryCoded:
    """Plane by plane: the signs of what the planes before left over, and as their scale the mean of its sizes.

    weight `[out, in]`; groups of group_size neighbouring columns, None: whole rows. The sign of 0 is +1; offset is 0.
    Computed in float64. Raises ValueError for an empty weight or one that is not finite, bits outside 1 .. 8, or a
    group that does not divide the columns.
    """
    weight, size = checked(weight, bits, group_size)
    rest = weight.reshape(len(weight), -1, size)
    signs, alpha = [], []
    for _ in range(bits):
        signs.append(np.where(rest < 0, -1, 1).astype(np.int8))
        alpha.append(np.abs(rest).mean(axis=-1))
        rest = rest - alpha[-1][..., None] * signs[-1]
    held = np.stack(signs, axis=-1).reshape(*weight.shape, bits)
    return BinaryCoded(held, np.stack(alpha, axis=-1), np.zeros(rest.shape[:2]))


def nearest_signs(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Signs `[.., size, planes]` int8 whose sums with alpha `[.., planes]` are nearest to values `[.., size]`.

    A value halfway between two sums takes the upper one. If all alpha are 0, values below 0 take −1 in all planes,
    others +1.
    """
    planes = alpha.shape[-1]
    choices = 2 * (np.arange(2**planes)[:, None] >> np.arange(planes) & 1) - 1  # [2^planes, planes], −1 first
    sums = alpha @ choices.T
    order = np.argsort(sums, axis=-1, kind="stable")
    sums = np.take_along_axis(sums, order, axis=-1)
    middles = (sums[..., 1:] + sums[..., :-1]) / 2
    place = (values[..., None] >= middles[..., None, :]).sum(axis=-1)  # how many lie below: the place in the order
    return choices[np.take_along_axis(order, place, axis=-1)].astype(np.int8)


def refine(weight: np.ndarray, coded: BinaryCoded) -> BinaryCoded:
    """One round of alternating quantization of weight `[out, in]`: better scales, then better signs. float64.

    In each group alpha becomes the least-squares solution for the signs at hand (where planes coincide, and many alpha
    are as good, the one nearest to the alpha at hand), then its absolute values, largest first. The signs are chosen
    anew for these, by `nearest_signs`. offset stays, and is subtracted from the weight first. The squared error of no
    group grows. Raises ValueError if weight and coded do not fit.
    """
    if weight.shape != coded.signs.shape[:2]:
        raise ValueError(f"weight must be [out, in] = {coded.signs.shape[:2]} like coded, got {weight.shape}")
    rows, groups, planes = coded.alpha.shape
    target = weight.astype(np.float64).reshape(rows, groups, -1) - coded.offset[..., None]
    signs = coded.signs.reshape(rows, groups, -1, planes).astype(np.float64)
    across = signs.swapaxes(2, 3)  # [out, groups, planes, size]
    rest = target[..., None] - signs @ coded.alpha[..., None]
    # rcond: the products of signs are small integers, and an eigenvalue that is not 0 is far from it.
    step = np.linalg.pinv(across @ signs, rcond=1e-9, hermitian=True) @ (across @ rest)
    alpha = -np.sort(-np.abs(coded.alpha + step[..., 0]), axis=-1)
    return BinaryCoded(nearest_signs(target, alpha).reshape(coded.signs.shape), alpha, coded.offset)


def rounds_of(weight: np.ndarray, bits: int, group_size: int | None, rounds: int) -> Iterator[BinaryCoded]:
    """`greedy`, and what each round of `refine` makes of it: rounds + 1 in all. One plane cannot be improved.

    Raises ValueError as `greedy`, and for negative rounds.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be 0 or more, got {rounds}")
    coded = greedy(weight, bits, group_size)
    yield coded
    for _ in range(rounds):
        coded = refine(weight, coded) if bits > 1 else coded
        yield coded


def alternating(weight: np.ndarray, bits: int, group_size: int | None = None, rounds: int = ROUNDS) -> BinaryCoded:
    """Alternating quantization from a greedy start: the last of `rounds_of`, and errors as there."""
    return list(rounds_of(weight, bits, group_size, rounds))[-1]


def from_uniform(quantized: Quantized) -> BinaryCoded:
    """A uniform grid as BCQ, the same values: scale · (code − zero) = Σ_p alpha_p · sign_p + offset.

    Bit p of a code, counted from the lowest, becomes the sign 2 · bit − 1 of the plane with alpha = scale · 2^p / 2,
    and offset = Σ_p alpha_p − scale · zero. The largest scale comes first: plane 0 is the highest bit.
    Raises ValueError unless groups are runs of neighbouring columns.
    """
    groups = quantized.scale.shape[1]
    if (quantized.group_of_column != np.arange(quantized.codes.shape[1]) * groups // quantized.codes.shape[1]).any():
        raise ValueError("groups must be runs of neighbouring columns; reorder the columns first")
    places = np.arange(quantized.bits)[::-1]
    signs = 2 * (quantized.codes[..., None] >> places & 1).astype(np.int8) - 1
    alpha = quantized.scale[..., None] * 2.0**places / 2
    return BinaryCoded(signs, alpha, alpha.sum(axis=-1) - quantized.scale * quantized.zero)


def pack(signs: np.ndarray) -> np.ndarray:
    """Signs `[out, in, planes]` -> int32 `[planes, ceil(out / 4), in / 32, 4]`, a bit each, set for +1.

    Bit j of word [p, r, w, i], the lowest first, is plane p of row 4 r + i and column 32 w + j. So 16 bytes, which a
    thread of the kernel loads at once, hold 32 columns of four rows, and all of them meet the same 32 activations.
    Missing rows are zeros. ValueError for other values and unless `in` is a multiple of 32.
    """
    if signs.ndim != 3 or signs.size == 0 or signs.shape[1] % 32 or not (np.abs(signs) == 1).all():
        raise ValueError(f"signs must be −1 and +1 [out, in, planes], in a multiple of 32, got shape {signs.shape}")
    rows, columns, planes = signs.shape
    bits = np.zeros((planes, -(-rows // 4) * 4, columns), dtype=bool)
    bits[:, :rows] = signs.transpose(2, 0, 1) > 0
    words = np.packbits(bits, axis=-1, bitorder="little").view("<i4")  # [planes, rows, in / 32]
    return np.ascontiguousarray(words.reshape(planes, -1, 4, columns // 32).swapaxes(2, 3)).astype(np.int32)


def keys(packed: np.ndarray) -> np.ndarray:
    """The bits of each row, eight neighbouring columns a byte, the first its lowest: uint8 `[planes, rows, in / 8]`.

    rows is a multiple of 4. Raises ValueError for another dtype or shape than `pack` makes.
    """
    if packed.ndim != 4 or packed.dtype != np.int32 or packed.shape[3] != 4:
        raise ValueError(f"packed must be int32 [planes, rows / 4, in / 32, 4], got {packed.dtype} {packed.shape}")
    words = np.ascontiguousarray(packed.astype("<i4").swapaxes(2, 3))
    return words.view(np.uint8).reshape(len(packed), -1, 4 * packed.shape[2])


def sign_sums(x: np.ndarray) -> np.ndarray:
    """The tables: x `[tokens, in]` -> `[tokens, in / 8, 256]` float64, all signed sums of eight neighbours.

    Entry `key` of table c adds x[8 c + j] where bit j of key is set and subtracts it where not. Each of the eight
    doubles the table, so an entry costs two additions, not eight.
    """
    eights = x.astype(np.float64).reshape(len(x), -1, 8)
    sums = np.zeros((*eights.shape[:2], 1))
    for j in range(8):
        sums = np.concatenate([sums - eights[..., j, None], sums + eights[..., j, None]], axis=-1)
    return sums


def lut_gemm(
    x: np.ndarray, packed: np.ndarray, alpha: np.ndarray, offset: np.ndarray | None, group_size: int
) -> np.ndarray:
    """x `[tokens, in]` times the transpose of binary-coded weights, by look-up: float64 `[tokens, out]`.

    packed as `pack` makes it; alpha `[out, in / group_size, planes]`; offset `[out, in / group_size]`, None for zeros.
    Group k is columns k · group_size to (k + 1) · group_size − 1; group_size is a multiple of 8. All but packed are
    converted to float64. `keys` says which entry of `sign_sums` each byte of packed asks for. The kernel's reference.
    Raises ValueError if the shapes do not fit together.
    """
    planes, fours, words, _ = packed.shape
    rows, groups = len(alpha), alpha.shape[1]
    fitting = alpha.shape == (rows, groups, planes) and -(-rows // 4) == fours and group_size % 8 == 0
    if not fitting or groups * group_size != 32 * words or x.ndim != 2 or x.shape[1] != 32 * words:
        raise ValueError(f"x {x.shape}, packed {packed.shape}, alpha {alpha.shape}, group_size={group_size} do not fit")
    if offset is not None and offset.shape != (rows, groups):
        raise ValueError(f"offset must be [out, groups] = {(rows, groups)}, got {offset.shape}")
    found = sign_sums(x)[:, np.arange(4 * words), keys(packed)[:, :rows]]  # [tokens, planes, out, in / 8]
    dots = found.reshape(len(x), planes, rows, groups, -1).sum(axis=-1)
    y = np.einsum("tpog,ogp->to", dots, alpha.astype(np.float64))
    totals = x.astype(np.float64).reshape(len(x), groups, -1).sum(axis=-1)
    return y if offset is None else y + totals @ offset.astype(np.float64).T


class BinaryLinear(nn.Module):
    """A linear layer that holds planes of signs: x `[..., in]` -> x Wᵀ + bias `[..., out]`. It is not trained.

    On CUDA the kernel multiplies a single row of x by the planes. For more rows, elsewhere, in 64 bits, and where x
    wants a gradient, the weights are expanded for each call.
    """

    def __init__(self, coded: BinaryCoded, bias: Tensor | None = None, dtype: torch.dtype = torch.float16) -> None:
        """Scales, and offsets unless all are zero, in `dtype`.

        Raises ValueError for groups that are no multiple of 32 columns, and scales or offsets too large for `dtype`.
        """
        super().__init__()
        self.group_size = coded.signs.shape[1] // coded.alpha.shape[1]
        if self.group_size % 32:
            raise ValueError(f"groups must be a multiple of 32 columns, got {self.group_size}")
        alpha, offset = (torch.from_numpy(part).to(dtype) for part in (coded.alpha, coded.offset))
        if not (alpha.isfinite().all() and offset.isfinite().all()):
            raise ValueError(f"scales must be finite in {dtype}, got up to {np.abs(coded.alpha).max():.3g}")
        self.packed, self.alpha = nn.Buffer(torch.from_numpy(pack(coded.signs))), nn.Buffer(alpha)
        self.offset = nn.Buffer(offset) if coded.offset.any() else None
        self.bias = bias

    def weight(self) -> Tensor:
        """The weights `[out, in]` that the planes stand for, float32 (float64 if the scales are)."""
        rows, groups, planes = self.alpha.shape
        bits = self.packed[..., None] >> torch.arange(32, dtype=torch.int32, device=self.packed.device) & 1
        signs = (2 * bits - 1).transpose(2, 3).reshape(planes, -1, groups, self.group_size)[:, :rows]
        alpha = self.alpha.to(torch.promote_types(self.alpha.dtype, torch.float32))
        values = torch.einsum("pogk,ogp->ogk", signs.to(alpha.dtype), alpha)
        return (values if self.offset is None else values + self.offset[..., None].to(values.dtype)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """x in any floating dtype; the result has the same."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        if not x.is_cuda or x.numel() != x.shape[-1] or x.dtype is torch.float64 or wants_gradient:
            return F.linear(x, self.weight().to(x.dtype), bias)
        from kernels.quantization.lut_gemm import lut_gemm as kernel

        row = x.reshape(1, -1).contiguous()
        out = kernel(row, self.packed, self.alpha, self.offset, self.group_size).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


@torch.no_grad()
def quantize_model(model: Transformer, bits: int, group_size: int, rounds: int = ROUNDS) -> dict[str, BinaryLinear]:
    """Give every linear layer of the blocks the weights that its `BinaryLinear` computes with; returns these."""
    held = {}
    for name, layer in surgery.linears(model).items():
        coded = alternating(layer.weight.numpy(force=True), bits, group_size, rounds)
        held[name] = BinaryLinear(coded, layer.bias)
        layer.weight.copy_(held[name].weight())
    return held


def stored_bits(layers: Collection[BinaryLinear]) -> float:
    """Bits per weight, counted in the buffers that the layers hold."""
    held = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    return 8 * held / sum(layer.alpha[..., 0].numel() * layer.group_size for layer in layers)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run lut_gemm`."""
    parser.add_argument("--bits", type=int, default=3, help="planes, 1 to 8 (default 3)")
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="a multiple of 32 (default 128)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of alternating; 0: greedy (default 15)")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Alternating quantization, which needs no calibration tokens; bits as `BinaryLinear` stores them."""
    held = quantize_model(model, args.bits, args.group_size, args.rounds)
    return {"bits per weight": stored_bits(held.values())}


@torch.no_grad()
def measure(lab: Lab, bits: int, group_size: int) -> tuple[dict[str, float], np.ndarray, float]:
    """Perplexity by method, and squared errors of the weights over ‖W‖²: after each round, and of a uniform grid."""
    uniform, first, last = models = [lab.model() for _ in METHODS]
    rounded = quantize_each(uniform, partial(round_to_nearest, bits=bits, group_size=group_size))
    errors = np.zeros(ROUNDS + 3)  # after each round; of the grid; of zeros, which is ‖W‖²
    for name, grid in rounded.items():
        weight = lab.weights[f"{name}.weight"].double().numpy()
        states = [coded.dequantize() for coded in rounds_of(weight, bits, group_size, ROUNDS)]
        for model, values in ((first, states[0]), (last, states[-1])):
            surgery.linears(model)[name].weight.copy_(torch.from_numpy(values))
        errors += [np.square(values - weight).sum() for values in (*states, grid.dequantize(), 0.0)]
    perplexity = {method: lab.perplexity(model) for method, model in zip(METHODS, models, strict=True)}
    return perplexity, errors[:-2] / errors[-1], errors[-2] / errors[-1]


def picture(found: dict[int, tuple[dict[str, float], np.ndarray, float]], base: float) -> Figure:
    """What rounds do to the weights, and what bits do to the model."""
    fig, (left, right) = panels(2, width=9.6)
    for role, (bits, (_, errors, uniform)) in zip(("accent", "second", "third"), found.items(), strict=True):
        left.plot(errors, **series(role))
        left.axhline(uniform, color=series(role)["color"], linewidth=0.8)
        left.annotate(f"{bits} bits", (1, errors[1]), xytext=(4, 4), textcoords="offset points")
    left.set(xlabel="rounds (thin lines: uniform)", ylabel="‖W − Q‖² / ‖W‖²", yscale="log", xticks=[0, 5, 10, 15])
    for method, role in METHODS.items():
        right.plot([*found], [each[0][method] - base for each in found.values()], **series(role), label=method)
    right.set(xlabel="bits", ylabel="rise of perplexity", yscale="log", xticks=[*found])
    legend(right)
    return fig


def claim(lab: Lab) -> Claim:
    """Alternating beats greedy at 2, 3 and 4 bits; at 2, where a grid has few values to place, also a uniform one."""
    columns = [layer.in_features for layer in surgery.linears(lab.model()).values()]
    size = next(size for size in (128, 64, 32, 1) if not any(wide % size for wide in columns))
    base, found = lab.base_perplexity, {bits: measure(lab, bits, size) for bits in (2, 3, 4)}
    numbers, rises, beaten = {"perplexity, full precision": base}, [], {method: [] for method in METHODS}
    for bits, (perplexity, errors, uniform) in found.items():
        error = dict(zip(METHODS, (uniform, errors[0], errors[-1]), strict=True))
        for method, value in perplexity.items():
            numbers |= {f"rise, {method}, {bits} bits": value - base, f"error, {method}, {bits} bits": error[method]}
            if error["alternating"] < error[method] and perplexity["alternating"] < value:
                beaten[method].append(bits)
        rises.append(f"{bits} bits " + ", ".join(f"{value - base:.2f}" for value in perplexity.values()))
    where = {method: ", ".join(map(str, widths)) or "no" for method, widths in beaten.items()}
    sentence = (
        f"{ROUNDS} rounds of alternating BCQ beat greedy at {where['greedy']} bits and a uniform grid at "
        f"{where['uniform']} bits: perplexity {base:.2f} rises, {', '.join(METHODS)}, by {'; '.join(rises)}."
    )
    setting = f"all blocks, groups of {size}; nothing is drawn; to beat: in perplexity and in error of the weights"
    holds = beaten["greedy"] == [2, 3, 4] and 2 in beaten["uniform"]
    return Claim(sentence, holds, numbers, picture(found, base), setting)
