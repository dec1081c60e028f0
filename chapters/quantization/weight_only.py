"""Weight-only product: hold weights in 2 to 4 bits, and let them become numbers only where they are multiplied.

    weight[row, column] = scale[row, group] * (code[row, column] − zero[row, group])        code = 0 .. 2^bits − 1
    y[token, row] = Σ_column x[token, column] · weight[row, column]

A group is a set of columns that share a scale and a zero point in each row; it may be a whole row. Activations stay
as they are: what a decode step waits for is the weights, of which it reads all for every token.

Saves    bytes: as stored here, with a 16-bit scale and an 8-bit zero, bits + 24 / g per weight in groups of g, where
         plain layers take 16: with 4 bits a 3.4th part in groups of 32, a 3.8th in groups of 128.
Costs    quality, by how codes are chosen (gptq), and unpacking: two to four instructions per weight, which a
         decode step has time for. A prompt of hundreds of tokens waits for arithmetic and gains nothing.
Paper    Hoque, Wright, Yang, Srivatsa, Ganti 2024, arXiv:2402.00025, section 2. Codes and grids as in Frantar et al.
         2022, arXiv:2210.17323, section 3.
Follows  unsigned codes, and zero points as codes. Released kernels differ in the order of packed columns; here a quad,
         four int32 words or one 128-bit load, serves runs of 32 neighbouring columns: nibble i (bits 4 i .. 4 i + 3)
         of word w belongs to column 4 i + w of a run. One shift of the four words thus gives four neighbours.
         4 bits: a quad holds a run. 2 bits: two runs, the first in the lower halves of the nibbles. 3 bits: three
         quads hold four runs, two as with 2 bits for the low bits, one for the top bits: `pack` states it.
Symbols  codes `[out, in]`; packed `[out, in · bits / 32]`; scale, zero `[out, groups]`; x `[tokens, in]`; y as x.
Kernel   kernels/quantization/weight_only.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from chapters.claims import Claim
from chapters.figures import figure, series
from chapters.lab import Lab
from minitfm import checkpoint, surgery
from minitfm.checkpoint import Checkpoint
from minitfm.model import Transformer

PLACES = np.arange(0, 32, 4, dtype=np.uint32)[:, None]  # bits below each nibble of a word
RUNS = {2: 2, 3: 4, 4: 1}  # bits: runs of 32 columns that share a quad, or with 3 bits three


@dataclass(frozen=True)
class Quantized:
    """A weight matrix on its grids.

    codes            `[out, in]` uint8, below 2**bits
    scale, zero      `[out, groups]` float64; zero holds integers
    group_of_column  `[in]`: groups are runs of neighbours, unless a quantizer takes the columns in another order
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group_of_column: np.ndarray
    bits: int

    def dequantize(self) -> np.ndarray:
        """The weights that the codes stand for, float64 `[out, in]`."""
        return dequantize(self.codes, self.scale[:, self.group_of_column], self.zero[:, self.group_of_column])

    def bits_per_weight(self) -> float:
        """Storage as papers count it: codes, and for each row of a group a 16-bit scale and a zero point of `bits`."""
        return self.bits + (16 + self.bits) * self.scale.size / self.codes.size


def checked(weight: np.ndarray, bits: int, group_size: int | None) -> tuple[np.ndarray, int]:
    """A float64 copy of weight `[out, in]`, and the number of columns in a group (None: all).

    Raises ValueError for an empty weight or one that is not finite, bits outside 1 .. 8, or a group that does not
    divide the columns.
    """
    weight = np.array(weight, dtype=np.float64)
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"weight must be a non-empty [out, in] matrix, got shape {weight.shape}")
    if not (np.abs(weight) < 1e100).all():  # spread errors must still fit float64
        raise ValueError(f"weight must be finite and below 1e100, got {np.sum(~(np.abs(weight) < 1e100))} others")
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    columns = weight.shape[1]
    if group_size is not None and (group_size < 1 or columns % group_size):
        raise ValueError(f"group_size must divide the {columns} columns of weight, got {group_size}")
    return weight, group_size or columns


def dequantize(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """scale * (code − zero), float64; scale and zero broadcast to codes."""
    return scale * (codes.astype(np.float64) - zero)


def nearest_codes(weight: np.ndarray, group_size: int | None = None, bits: int = 4) -> Quantized:
    """The plainest quantizer: in each row of a group 2**bits values from min(weights, 0) to max(weights, 0).

    weight `[out, in]`. Scales are rounded to float16, in which they are stored, before the codes are chosen; the least
    is 2^−24. Raises ValueError as `checked`, and where a scale is too large for float16.
    """
    weight, size = checked(weight, bits, group_size)
    groups, last = weight.reshape(len(weight), -1, size), 2**bits - 1  # [out, groups, size]
    low, high = np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)
    with np.errstate(over="ignore"):
        scale = np.maximum((high - low) / last, 2.0**-24).astype(np.float16).astype(np.float64)
    if not np.isfinite(scale).all():
        raise ValueError(f"weight needs scales too large for float16, it goes from {weight.min()} to {weight.max()}")
    zero = np.rint(-low / scale).clip(0, last)
    codes = (np.rint(groups / scale[..., None]) + zero[..., None]).clip(0, last).astype(np.uint8)
    return Quantized(codes.reshape(weight.shape), scale, zero, np.arange(weight.shape[1]) // size, bits)


def span(bits: int) -> int:
    """Columns that are packed together: 32 with 4 bits, 64 with 2, 128 with 3. ValueError for other bits."""
    if bits not in RUNS:
        raise ValueError(f"bits must be 2, 3 or 4, got {bits!r}")
    return 32 * RUNS[bits]


def pack(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """Codes 0 .. 2**bits − 1, integers `[out, in]` -> int32 `[out, in · bits / 32]`, in the layout of the first lines.

    With 4 bits, four words hold a run of 32 columns: bits 4 i .. 4 i + 3 of word w are column 4 i + w of it. Let W(run)
    be such words also of narrower codes. With 2 bits, W(0) | W(1) << 2 holds 64 columns. With 3 bits, 128 columns are
    low(0) | low(1) << 2, low(2) | low(3) << 2 and top(0) | top(1) << 1 | top(2) << 2 | top(3) << 3, where low = W &
    0x33333333 and top = W >> 2 & 0x11111111; a row has the first of these for all its columns, then the second, ..
    Raises ValueError for other codes, other bits, and unless `in` is a multiple of 32, 64 (2 bits) or 128 (3 bits).
    """
    if codes.ndim != 2 or codes.size == 0 or codes.shape[1] % span(bits) or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers [out, {span(bits)} k], got {codes.dtype} {codes.shape}")
    if codes.min() < 0 or codes.max() >= 2**bits:
        raise ValueError(f"codes must be from 0 to {2**bits - 1}, got {codes.min()} to {codes.max()}")
    places = codes.reshape(len(codes), -1, RUNS[bits], 8, 4).astype(np.uint32)  # [out, spans, runs, place, word]
    words = np.bitwise_or.reduce(places << PLACES, axis=3)  # [out, spans, runs, 4]
    quads, low = words, words & 0x33333333
    if bits < 4:
        quads = low[:, :, ::2] | low[:, :, 1::2] << 2  # [out, spans, runs / 2, 4]
    if bits == 3:
        top = np.bitwise_or.reduce((words >> 2 & 0x11111111) << np.arange(4, dtype=np.uint32)[:, None], axis=2)
        quads = np.concatenate([quads, top[:, :, None]], axis=2)
    return np.ascontiguousarray(quads.swapaxes(1, 2)).reshape(len(codes), -1).view(np.int32)


def nibbles(packed, bits: int) -> list:
    """For each run of a span `[out, spans, 4]`: its words with a nibble a code. packed: an array or a tensor."""
    quads = packed.reshape(len(packed), RUNS[bits] * bits // 4, -1, 4)
    if bits == 4:
        return [quads[:, 0]]
    low = [quads[:, run // 2] >> 2 * (run % 2) & 0x33333333 for run in range(RUNS[bits])]
    return low if bits == 2 else [words | (quads[:, 2] >> run & 0x11111111) << 2 for run, words in enumerate(low)]


def unpack(packed: np.ndarray, bits: int = 4) -> np.ndarray:
    """Inverse of `pack`: int32 `[out, in · bits / 32]` -> uint8 `[out, in]`. ValueError for another dtype or width."""
    if packed.ndim != 2 or packed.dtype != np.int32 or packed.shape[1] % (span(bits) * bits // 32):
        raise ValueError(f"packed must be int32 [out, {span(bits) * bits // 32} k], got {packed.dtype} {packed.shape}")
    words = np.stack(nibbles(packed.view(np.uint32), bits), axis=2)[..., None, :]  # [out, spans, runs, 1, 4]
    return (words >> PLACES & 15).astype(np.uint8).reshape(len(packed), -1)


def weight_only_matmul(
    x: np.ndarray, packed: np.ndarray, scale: np.ndarray, zero: np.ndarray, group_size: int, bits: int = 4
) -> np.ndarray:
    """x `[tokens, in]` times the transpose of the packed weights: `[tokens, out]`; the kernel's reference.

    packed is int32 `[out, in · bits / 32]` as `pack` makes it; scale, zero `[out, in / group_size]`: group k is columns
    k · group_size to (k + 1) · group_size − 1. x, scale and zero may have any dtype; they are converted to float64,
    and so is the result. Raises ValueError if the shapes do not fit together.
    """
    codes = unpack(packed, bits)
    columns = codes.shape[1]
    fitting = (len(packed), scale.shape[-1]) == scale.shape == zero.shape and scale.shape[-1] * group_size == columns
    if not fitting or x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x {x.shape}, packed {packed.shape}, scale {scale.shape}, zero {zero.shape} do not fit")
    group = np.arange(columns) // group_size
    weight = dequantize(codes, scale.astype(np.float64)[:, group], zero.astype(np.float64)[:, group])
    return x.astype(np.float64) @ weight.T


class WeightOnlyLinear(nn.Module):
    """A linear layer that holds its weights in 2, 3 or 4 bits: x `[..., in]` -> x Wᵀ + bias `[..., out]`. Not trained.

    On CUDA the kernel multiplies by the packed weights. Elsewhere, in 64 bits, and where x wants a gradient, they are
    expanded for each call. Where groups are no runs of neighbours, columns are stored in the order of their groups and
    x is reordered.
    """

    def __init__(self, quantized: Quantized, bias: Tensor | None = None, dtype: torch.dtype = torch.float16) -> None:
        """Scales in `dtype`, zeros in uint8, codes of 1 bit in 2.

        Raises ValueError for more than 4 bits, columns that `pack` refuses, groups that are no multiple of 32 columns,
        zeros that are no integers from 0 to 255, and scales too large for `dtype`.
        """
        super().__init__()
        order = np.argsort(quantized.group_of_column, kind="stable")
        self.bits, self.group_size = max(2, quantized.bits), len(order) // quantized.scale.shape[1]
        if self.bits > 4 or self.group_size % 32:
            raise ValueError(f"need bits <= 4 and groups of 32 k columns, got {quantized.bits}, {self.group_size}")
        scale, zero = torch.from_numpy(quantized.scale).to(dtype), quantized.zero
        if not np.isin(zero, np.arange(256)).all():
            raise ValueError(f"zero must hold integers from 0 to 255, got {zero.min()} to {zero.max()}")
        if not scale.isfinite().all():
            raise ValueError(f"scale must be finite in {dtype}, got up to {np.abs(quantized.scale).max():.3g}")
        self.packed = nn.Buffer(torch.from_numpy(pack(quantized.codes[:, order], self.bits)))
        self.scale, self.zero = nn.Buffer(scale), nn.Buffer(torch.from_numpy(zero).to(torch.uint8))
        in_order = bool((order[1:] > order[:-1]).all())
        self.order = None if in_order else nn.Buffer(torch.from_numpy(order))
        self.bias = bias

    def weight(self) -> Tensor:
        """The dequantized weights `[out, in]`, columns in stored order, float32 (float64 if the scales are)."""
        places = torch.arange(0, 32, 4, dtype=torch.int32, device=self.packed.device)[:, None]
        codes = torch.stack(nibbles(self.packed, self.bits), dim=2)[..., None, :] >> places & 15
        scale = self.scale.to(torch.promote_types(self.scale.dtype, torch.float32))
        groups = codes.flatten(1).unflatten(1, (-1, self.group_size)) - self.zero[..., None].int()
        return (scale[..., None] * groups).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """x in any floating dtype; the result has the same."""
        x = x if self.order is None else x[..., self.order]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        if not x.is_cuda or x.dtype is torch.float64 or wants_gradient:
            return F.linear(x, self.weight().to(x.dtype), bias)
        from kernels.quantization.weight_only import weight_only_matmul as kernel

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = kernel(rows, self.packed, self.scale, self.zero, self.group_size, self.bits).unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias


@torch.no_grad()
def quantize_each(model: Transformer, quantizer: Callable[[np.ndarray], Quantized]) -> dict[str, Quantized]:
    """Give every linear layer of the blocks the values that `quantizer` leaves its weight; returns what each became."""
    done = {}
    for name, layer in surgery.linears(model).items():
        done[name] = quantizer(layer.weight.numpy(force=True))
        layer.weight.copy_(torch.from_numpy(done[name].dequantize()))
    return done


def use_packed(model: Transformer, quantized: dict[str, Quantized], dtype: torch.dtype | None = None) -> None:
    """Put a `WeightOnlyLinear` in the place of each named linear layer, scales in `dtype`, None: its weight's."""
    layers = surgery.linears(model)
    for name, held in quantized.items():
        weight, bias = layers[name].weight, layers[name].bias
        surgery.replace(model, name, WeightOnlyLinear(held, bias, dtype or weight.dtype).to(weight.device))


def place_packed(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """`prepare` of a packed checkpoint: makes the layers that tensors fill. ValueError if these cannot be theirs."""
    for name, layer in surgery.linears(model).items():
        packed, scale, order = (tensors.get(f"{name}.{part}") for part in ("packed", "scale", "order"))
        if packed is None or scale is None:
            continue
        wide, groups = layer.in_features, scale.shape[1] if scale.dim() == 2 else 0
        bits = next((bits for bits in RUNS if packed.shape[1:] == (wide * bits // 32,)), None)
        if bits is None or groups == 0 or wide % groups or not scale.is_floating_point():
            raise ValueError(f"{name}: packed {[*packed.shape]}, scale {[*scale.shape]} do not make {wide} columns")
        columns = np.arange(wide) if order is None else order.numpy()
        if not np.array_equal(np.sort(columns), np.arange(wide)):
            raise ValueError(f"{name}.order must hold each of {wide} columns once")
        codes, grids = np.zeros((layer.out_features, wide), np.uint8), np.zeros((layer.out_features, groups))
        empty = Quantized(codes, grids, grids, np.argsort(columns) // (wide // groups), bits)
        surgery.replace(model, name, WeightOnlyLinear(empty, layer.bias, scale.dtype))


def load_packed(folder: Path | str) -> Checkpoint:
    """A checkpoint that holds packed layers, as `checkpoint.save` writes it after `use_packed`; errors as `load`."""
    return checkpoint.load(folder, prepare=place_packed)


def stored_bits(layers: Iterable[nn.Module]) -> float:
    """Bits per weight, counted in the buffers that the `WeightOnlyLinear` among `layers` hold."""
    packed = [layer for layer in layers if isinstance(layer, WeightOnlyLinear)]
    held = sum(buffer.nbytes for layer in packed for buffer in layer.buffers())
    return 8 * held / sum(32 * layer.packed.numel() // layer.bits for layer in packed)


def options(parser: argparse._ActionsContainer) -> None:
    """Options of `python -m chapters run weight_only`."""
    parser.add_argument("--bits", type=int, default=4, help="2, 3 or 4 (default 4)")
    parser.add_argument("--group-size", type=int, default=32, metavar="G", help="a multiple of 32 (default 32)")
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="save the packed layers, for `load_packed`")


def apply(model: Transformer, tokens: Tensor, args: argparse.Namespace) -> dict[str, float | str]:
    """Round to the nearest of 2**bits values, which needs no calibration tokens; bits as `WeightOnlyLinear` holds."""
    span(args.bits)
    done = quantize_each(model, partial(nearest_codes, group_size=args.group_size, bits=args.bits))
    packed = copy.deepcopy(model)
    use_packed(packed, done, torch.float16)
    report: dict[str, float | str] = {"bits per weight": stored_bits(packed.modules())}
    if args.packed:
        tokenizer = checkpoint.load(args.model or checkpoint.BASE).tokenizer
        checkpoint.save(args.packed, packed, tokenizer, {"technique": "quantization.weight_only"})
        report["packed checkpoint, MB"] = (args.packed / "model.safetensors").stat().st_size / 1e6
    return report


@torch.no_grad()
def measure(lab: Lab, group_size: int | None, bits: int = 4) -> dict[str, float]:
    """Perplexity, bits per weight as held and by the formula, and how far logits move when the layers are packed."""
    model = lab.model()
    done = quantize_each(model, partial(nearest_codes, group_size=group_size, bits=bits))
    perplexity, texts = lab.perplexity(model), [lab.calibration(seed, count=4) for seed in lab.seeds]
    rounded = torch.cat([model(text) for text in texts])
    use_packed(model, done, torch.float16)
    moved = (torch.cat([model(text) for text in texts]) - rounded).abs().max() / rounded.abs().max()
    weights, groups = (sum(getattr(held, part).size for held in done.values()) for part in ("codes", "scale"))
    held, formula = stored_bits(model.modules()), bits + 24 * groups / weights
    return {"perplexity": perplexity, "bits": held, "formula": formula, "moved": float(moved)}


def picture(found: dict[str, dict[str, float]], base: float) -> Figure:
    """What a group size costs in bytes, and what it buys."""
    fig, axes = figure()
    byte, rise = ([each[key] for each in found.values()] for key in ("bits", "perplexity"))
    axes.plot([bits / 8 for bits in byte], [perplexity - base for perplexity in rise], **series("method"))
    for words, bits, perplexity in zip(found, byte, rise, strict=True):
        axes.annotate(words, (bits / 8, perplexity - base), xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="bytes per weight (16 bits: 2)", ylabel="rise of perplexity")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    return fig


def claim(lab: Lab) -> Claim:
    """Packed layers compute what the rounded weights do from the bytes of the formula; small groups lose less."""
    columns = [layer.in_features for layer in surgery.linears(lab.model()).values()]
    sizes = [size for size in (32, 64, 128) if not any(wide % size for wide in columns)]
    found = {f"groups of {size}": measure(lab, size) for size in sizes} | {"whole rows": measure(lab, None)}
    finest, coarsest = (list(found.values())[i] for i in (0, -1))
    narrow = [bits for bits in (3, 2) if not any(wide % span(bits) for wide in columns)]
    every = found | {f"{bits} bits, groups of 32": measure(lab, 32, bits) for bits in narrow}
    same = all(each["moved"] < 1e-4 for each in every.values())  # float32 sums of a few hundred terms
    exact = all(abs(each["bits"] - each["formula"]) < 1e-9 for each in every.values())
    rise, coarse = (each["perplexity"] - lab.base_perplexity for each in (finest, coarsest))
    sentence = (
        f"Block linears packed in 4 bits and {next(iter(found))} hold 1/{16 / finest['bits']:.2f} of the 16-bit bytes "
        f"and compute {'the same' if same else 'other'} logits as the rounded weights; perplexity "
        f"{lab.base_perplexity:.2f} rises by {rise:.2f}, with grids for whole rows by {coarse:.2f}."
    )
    numbers = {"perplexity, full precision": lab.base_perplexity}
    numbers |= {f"{key}, {words}": each[key] for words, each in every.items() for key in each}
    setting = f"all blocks, round to nearest; logits compared on 4 training sequences of each of seeds {lab.seeds}"
    return Claim(sentence, same and exact and rise < coarse, numbers, picture(found, lab.base_perplexity), setting)
