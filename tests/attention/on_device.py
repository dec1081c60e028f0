"""Attention problems as kernels get them: small, on the device, in memory as projections leave it, and fenced."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from tests.attention.problems import HEADS, problems
from tests.conftest import DEVICE, KERNEL_DTYPES, poisoned
from tests.fences import walled

TILES = st.sampled_from((16, 32))
LENGTHS = st.sampled_from((1, 17, 33)) | st.integers(1, 33)
PROBLEMS = problems(LENGTHS, st.sampled_from((1, 16, 24, 40, 80)), heads=HEADS[:5])
DTYPES = st.sampled_from(KERNEL_DTYPES)
few_examples = settings(max_examples=max(settings.default.max_examples // 3, 8))  # ~60 ms each in the interpreter


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: on a 16-byte boundary or not, as [B, H, length, D] or `across`, as [B, length, H, D]."""

    aligned: bool = True
    across: bool = False


PLACES = st.lists(st.builds(Place, st.booleans(), st.booleans()), min_size=5, max_size=5)  # one for each tensor


def on_device(x: np.ndarray, dtype: torch.dtype, place: Place = Place()) -> torch.Tensor:
    """A poisoned tensor at its place."""
    tensor = torch.from_numpy(x).to(DEVICE, dtype)
    if not place.across:
        return poisoned(tensor, place.aligned)
    return poisoned(tensor.transpose(1, 2), place.aligned).transpose(1, 2)


def at_the_wall(x: np.ndarray, begins: bool) -> torch.Tensor:
    """A float32 tensor that ends or begins where nothing may be read."""
    return walled(torch.from_numpy(x).to(DEVICE, torch.float32), begins)
