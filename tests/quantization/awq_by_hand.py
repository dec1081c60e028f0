"""The parts of AWQ by the words of their definitions, one number at a time, and arrays that cannot be written to."""

from __future__ import annotations

import numpy as np
from torch import nn

from minitfm.model import RMSNorm


def frozen(*arrays: np.ndarray) -> list[np.ndarray]:
    """Copies that cannot be written to."""
    copies = [np.array(array, dtype=float) for array in arrays]
    for copy in copies:
        copy.flags.writeable = False
    return copies


def group_by_hand(group: np.ndarray, bits: int) -> tuple[list[int], float, int]:
    """Codes, scale and zero of one group of one row, by the words of the definition."""
    top, low, high = 2**bits - 1, float(group.min()), float(group.max())
    scale = max(high - low, 1e-5) / top
    zero = min(max(-round(low / scale), 0), top)
    return [min(max(round(float(w) / scale) + zero, 0), top) for w in group], scale, zero


def rounded_by_hand(weight: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Every weight on its grid, dequantized."""
    out = np.empty(weight.shape)
    for row, start in np.ndindex(len(weight), weight.shape[1] // size):
        columns = slice(start * size, (start + 1) * size)
        codes, scale, zero = group_by_hand(weight[row, columns], bits)
        out[row, columns] = [scale * (code - zero) for code in codes]
    return out


def scales_by_hand(magnitude: np.ndarray, ratio: float) -> list[float]:
    """The scale of each channel, one at a time."""
    powers = [max(float(m) ** ratio, 1e-4) for m in magnitude]
    return [power / (max(powers) * min(powers)) ** 0.5 for power in powers]


def size_of_groups(columns: int, parts: int | None) -> int | None:
    return columns // parts if parts and columns % parts == 0 else None


def losses_by_hand(weight: np.ndarray, x: np.ndarray, bits: int, size: int) -> list[float]:
    """Mean squared error of the outputs x Wᵀ of one layer for each of the twenty ratios."""
    losses = []
    for i in range(20):
        scales = np.array(scales_by_hand(np.abs(x).mean(axis=0), i / 20))
        rounded = rounded_by_hand(weight * scales, bits, size) / scales
        losses.append(np.mean((x @ rounded.T - x @ weight.T) ** 2))
    return losses


def clip_errors(weight: np.ndarray, x: np.ndarray, bits: int) -> list[float]:
    """For one row of one group, the mean squared error of its output for each of the ten limits."""
    errors, largest = [], max(abs(float(w)) for w in weight)
    for i in range(10):
        limit = largest * (1 - i / 20)
        codes, scale, zero = group_by_hand(weight.clip(-limit, limit), bits)
        moved = [scale * (code - zero) - w for code, w in zip(codes, weight, strict=True)]
        errors.append(float(np.mean([np.dot(moved, token) ** 2 for token in x])))
    return errors


def norm(kind: str, channels: int) -> nn.Module:
    """What makes the inputs, with gains, rows and biases that differ, in float64."""
    made = {
        "rms": lambda: RMSNorm(channels, 1e-5),
        "layer": lambda: nn.LayerNorm(channels),
        "linear": lambda: nn.Linear(3, channels, bias=False),
        "linear with bias": lambda: nn.Linear(3, channels),
    }[kind]().double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made
