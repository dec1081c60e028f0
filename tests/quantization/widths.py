"""What the tests of mixed precision draw: layers of several widths, and the kernel's arguments."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from chapters.quantization.weight_only import Quantized
from chapters.shared.packed_layers import SPAN, PackedLayers
from tests.conftest import DEVICE

SEEDS = st.integers(0, 2**32 - 1)
GROUPS = st.sampled_from([8, 16, 24])


def drawn(seed: int, bits: list[int], group: int) -> list[Quantized]:
    """Layers of one group, of a few, and of some more than a span, or than two; all codes and zeros occur."""
    rng, layers = np.random.default_rng(seed), []
    for width in bits:
        rows = int(rng.choice([1, 3, SPAN // (2 * group), SPAN // (2 * group) + 1, SPAN // (2 * group) * 2 + 1]))
        codes = rng.integers(0, 2**width, (rows, 2 * group)).astype(np.uint8)
        scale = rng.choice([0.5, 0.01, 2.0**-24, 30.0, 0.0], (rows, 2)).astype(np.float16).astype(float)
        zero = rng.integers(0, 2**width, (rows, 2)).astype(float)
        layers.append(Quantized(codes, scale, zero, np.arange(2 * group) // group, width))
    return layers


def weights_of(layers: list[Quantized]) -> np.ndarray:
    return np.concatenate([layer.dequantize().ravel() for layer in layers])


def on_device(held: PackedLayers, scale: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The kernel's arguments by name; the table stays on the CPU."""
    parts = {name: torch.from_numpy(getattr(held, name)) for name in ("packed", "table", "scale", "zero")}
    parts["scale"] = parts["scale"].to(scale)
    return {name: part if name == "table" else part.to(DEVICE) for name, part in parts.items()}
