"""Weights on learned steps for the tests of quantization-aware training, and how far sums over them may lie apart."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st

from tests.conftest import DEVICE, KERNEL_DTYPES, tolerance

SEEDS = st.integers(0, 2**32 - 1)
SIZES = {"seed": SEEDS, "groups": st.sampled_from([1, 2, 3, 7]), "n": st.sampled_from([1, 2, 5, 17, 33])}
CODES = st.sampled_from([(2, True), (3, True), (4, True), (8, True), (1, False), (2, False), (8, False)])
TILES = st.sampled_from([None, (1, 64), (2, 16), (4, 32)])
DRAWN = {**SIZES, "codes": CODES, "tile": TILES, "dtype": st.sampled_from(KERNEL_DTYPES), "aligned": st.booleans()}


def limits(bits: int, signed: bool) -> tuple[int, int]:
    """The least and the largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def drawn(seed: int, groups: int, n: int, bits: int, signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, dy float32 `[groups, n]` and scale `[groups]`: ties, the ends of the codes themselves, zeros, far outside."""
    rng = np.random.default_rng(seed)
    scale = rng.choice([0.5, 0.25, 0.03, 1.7, 1e-3], groups).astype(np.float32)
    low, high = limits(bits, signed)
    q = rng.uniform(1.3 * low - 1, 1.3 * high + 1, (groups, n))
    exact = rng.choice([low, high, 0, 0.5, 1.5, low - 0.5, high + 0.5, 20 * high], q.shape)
    q = np.where(rng.random(q.shape) < 0.4, exact, q)
    return (q * scale[:, None]).astype(np.float32), scale, rng.normal(1, 1, q.shape).astype(np.float32)


def close(dtype, dy: np.ndarray, bits: int, signed: bool, n: int) -> dict[str, float]:
    """The tolerance of dscale: a sum of n terms of at most the largest dy times the largest code."""
    low, high = limits(bits, signed)
    return tolerance(dtype, n, scale=float(np.abs(dy).max()) * max(-low, high) / math.sqrt(n * high))


def on_device(seed, groups, n, codes, dtype=torch.float32) -> list[torch.Tensor]:
    """x, scale and dy `[groups, n]` of `drawn`, x and dy in `dtype`."""
    x, scale, dy = (torch.from_numpy(part).to(DEVICE) for part in drawn(seed, groups, n, *codes))
    return [x.to(dtype), scale, dy.to(dtype)]


def numbers(*tensors: torch.Tensor) -> list[np.ndarray]:
    """What the kernel computes with."""
    return [tensor.float().cpu().numpy() for tensor in tensors]
