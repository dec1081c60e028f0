"""Layers of several bit widths in one buffer, which one GPU launch expands.

A span is 16384 codes of a layer. Lane t of its 128 lanes has octets t, 128 + t, 256 + t, .. of 8 neighbouring codes: 16
octets, 128 codes, held as 128 · bits bits one after the other, the lowest first. That is one quad, 16 bytes, for each
bit; quad q of lane t is number 128 q + t of the span. Whatever the width, a GPU thread that plays a lane loads 16 bytes
beside its neighbour's, and an octet that it stores in 16 bits is 16 bytes beside its neighbour's, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from chapters.quantization.uniform import pack, unpack
from chapters.quantization.weight_only import Quantized

OCTETS, LANES = 16, 128
SPAN = OCTETS * LANES * 8


class PackedLayers(NamedTuple):
    """Layers of several widths in one buffer: the arguments of `dequantize_layers`, arrays or tensors.

    packed      int32 `[words]`: the spans of one layer after the other, the last of each filled up with codes 0
    table       int64 `[layers + 1, 4]`: spans, quads and octets before this layer, its bits; then the totals and a 0
    scale, zero `[groups]`: float16 and uint8, of one layer after the other
    """

    packed: np.ndarray
    table: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group_size: int


def pack_layers(layers: Sequence[Quantized]) -> PackedLayers:
    """One buffer of layers of any bits from 1 to 8, all in groups of the same size, a multiple of 8 columns."""
    group_sizes = {layer.codes.size // layer.scale.size for layer in layers}
    if len(group_sizes) != 1 or min(group_sizes) % 8:
        raise ValueError(f"layers must share one group size, a multiple of 8, got {sorted(group_sizes)}")
    rows, words = [(0, 0, 0, 0)], []
    for layer in layers:
        streams = np.pad(layer.codes.ravel(), (0, -layer.codes.size % SPAN)).reshape(-1, OCTETS, LANES, 8)
        streams = pack(streams.swapaxes(1, 2).reshape(-1, LANES, OCTETS * 8), layer.bits)  # [spans, lanes, 16 bits]
        quads = streams.reshape(-1, LANES, layer.bits, 16).swapaxes(1, 2)
        words.append(np.ascontiguousarray(quads).view(np.int32).ravel())
        spans, before, octets, _ = rows[-1]
        rows[-1] = spans, before, octets, layer.bits
        rows.append((spans + len(streams), before + quads.size // 16, octets + layer.codes.size // 8, 0))
    scale, zero = (np.concatenate([getattr(layer, part).ravel() for layer in layers]) for part in ("scale", "zero"))
    grids = scale.astype(np.float16), zero.astype(np.uint8)
    return PackedLayers(np.concatenate(words), np.array(rows), *grids, group_sizes.pop())


def dequantize_layers(
    packed: np.ndarray, table: np.ndarray, scale: np.ndarray, zero: np.ndarray, group_size: int
) -> np.ndarray:
    """The weights of all layers of a `PackedLayers`, one after the other, float64 `[weights]`: the kernel's reference.

    scale[group] * (code − zero[group]); weights k · group_size to (k + 1) · group_size − 1 are group k. Raises
    ValueError unless the table's last row gives the sizes of packed, scale and zero.
    """
    _, quads, octets, _ = table[-1]
    if packed.size != 4 * quads or scale.shape != zero.shape or scale.size * group_size != 8 * octets:
        raise ValueError(f"table ends with {table[-1]}, packed has {packed.size} words, scale {scale.shape} groups")
    codes = []
    for (_, first, begin, bits), (_, last, end, _) in pairwise(table):
        lanes = packed[4 * first : 4 * last].view(np.uint8).reshape(-1, bits, LANES, 16).swapaxes(1, 2)
        streams = unpack(lanes.reshape(-1, LANES, 16 * bits), int(bits)).reshape(-1, LANES, OCTETS, 8)
        codes.append(streams.swapaxes(1, 2).ravel()[: 8 * (end - begin)])
    groups = np.concatenate(codes).reshape(-1, group_size).astype(np.float64)
    return (scale.astype(np.float64)[:, None] * (groups - zero[:, None])).ravel()
