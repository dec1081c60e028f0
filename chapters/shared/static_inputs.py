"""What block linears read, held on static grids: one for each tensor, of 8 bits or of as many as it demands.

Layers that read the same tensor, such as query, key and value, are counted once: they share its grid and its bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minitfm import evaluate, surgery
from minitfm.model import Transformer


class GriddedLinear(nn.Linear):
    """A linear layer whose input is rounded to one static grid of 2^bits values, which spans low .. high and 0."""

    def __init__(self, layer: nn.Linear, low: float, high: float, bits: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device)
        self.weight, self.bias, self.last = layer.weight, layer.bias, 2**bits - 1
        low, high = min(low, 0.0), max(high, 0.0)
        self.scale = max((high - low) / self.last, 1e-8)
        self.zero = round(-low / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x in any floating dtype; the result has the same."""
        rounded = torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero, 0, self.last)
        return super().forward(rounded.to(x.dtype))


class Activation(NamedTuple):
    """A tensor that block linears read: their names, and its range on calibration text."""

    readers: list[str]
    low: float
    high: float


def activations(model: Transformer, tokens: Tensor) -> list[Activation]:
    """What block linears read, each tensor once; ranges of all tokens `[N, T]`."""
    readers = list(surgery.norm_readers(model).values())
    readers += [[name] for name in surgery.linears(model) if not any(name in names for names in readers)]
    seen: dict[str, list[Tensor]] = {}
    for name, x in surgery.record_inputs(model, tokens, list(surgery.linears(model))):
        seen.setdefault(name, []).append(torch.stack(torch.aminmax(x.float())))
    ends = [torch.stack(seen[names[0]]) for names in readers]  # [batches, 2]
    return [
        Activation(names, float(e[:, 0].min()), float(e[:, 1].max())) for names, e in zip(readers, ends, strict=True)
    ]


def round_activations(model: Transformer, found: Sequence[Activation], bits: Sequence[int] | np.ndarray) -> Transformer:
    """Hold each tensor of `found` in its bits, in place, anew where it was rounded before; returns the model."""
    layers = surgery.linears(model)
    for (readers, low, high), width in zip(found, bits, strict=True):
        for name in readers:
            surgery.replace(model, name, GriddedLinear(layers[name], low, high, int(width)))
    return model


@torch.no_grad()
def most_hurt(model: Transformer, found: Sequence[Activation], tokens: Tensor) -> np.ndarray:
    """Order of the tensors `found`, that first which alone in 8 bits raises the loss on tokens `[N, T]` the most."""
    loss = [evaluate.mean_nll(round_activations(copy.deepcopy(model), [one], [8]), tokens) for one in found]
    return np.argsort(loss, kind="stable")[::-1]
