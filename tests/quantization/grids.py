"""What the tests of uniform quantization draw, by-hand versions of its parts, and what torch and torchao stored."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from tests.conftest import golden, oracle

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.integers(1, 8)
TEMPERS = {
    "plain": lambda x: x,
    "huge": lambda x: 3e3 * x,
    "tiny": lambda x: 1e-6 * x,
    "positive": np.abs,
    "negative": lambda x: -np.abs(x),
    "constant": lambda x: np.broadcast_to(x[:, :1], x.shape).copy(),
    "some rows zero": lambda x: x * (np.arange(len(x)) % 2)[:, None],
    "outlier": lambda x: x * np.where(np.arange(x.shape[1]) == x.shape[1] // 2, 50, 1),
    "whole numbers": np.rint,
}
# Peers that stored their scales: key of the golden arrays, scheme, bits, numbers in a group.
GOLDEN = [
    ("g32_asym_q4", "asymmetric", 4, 32),
    ("g32_sym_q4", "torch", 4, 32),
    ("g32_sym_q4", "gptq", 4, 32),
    ("g32_symnoclip_q4", "no_clipping", 4, 32),
    ("g64_sym_q8", "smoothquant", 8, 64),
    ("X_pertoken_sym_q8", "smoothquant", 8, 128),
]


def drawn(seed: int, temper: str, rows: int, columns: int, dtype: type = np.float64) -> np.ndarray:
    return TEMPERS[temper](np.random.default_rng(seed).standard_normal((rows, columns))).astype(dtype)


def peer(key: str, bits: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Groups `[groups, n]` float32 and what the peer made of them: scale, zero and codes, moved to 0 .. 2**bits − 1."""
    arrays = golden("quant/uniform")
    x = arrays["X" if key.startswith("X") else "W"].astype(np.float32).reshape(-1, n)
    scale, codes = arrays[f"{key}/scale"].reshape(-1, 1), arrays[f"{key}/codes"].reshape(-1, n)
    shift = 2 ** (bits - 1) if codes.dtype == np.int8 else 0
    zero = arrays.get(f"{key}/zp", np.zeros(scale.shape)).reshape(-1, 1) + shift
    return x, scale, zero, codes.astype(int) + shift


def steps(low: float, high: float, bits: int, scheme: str) -> float:
    """The scale of one range, by the words of the definition."""
    h, a = 2 ** (bits - 1), max(high, -low)
    if scheme == "no_clipping":
        return max(high / (h - 1), -low / h)
    if scheme == "gptq" and low == 0:
        return high / (2 * h - 1)
    return {"gptq": a / (h - 0.5), "torch": a / (h - 0.5), "deepspeed": a / h}.get(scheme) or a / (h - 1)


def packed_by_hand(codes: np.ndarray, bits: int) -> np.ndarray:
    """One row, bit by bit."""
    made = [0] * (len(codes) * bits // 8)
    for i, code in enumerate(codes):
        for place in range(bits):
            at = i * bits + place
            made[at // 8] += (int(code) >> place & 1) << at % 8
    return np.array(made, np.uint8)


def expected_of(x: torch.Tensor, *choice) -> tuple[np.ndarray, ...]:
    """What the book's reference makes of x, in float32."""
    return oracle("quantization.uniform").quantize_and_pack(x.float().cpu().numpy(), *choice)


def assert_equal(found: tuple[torch.Tensor, ...], expected: tuple[np.ndarray, ...]) -> None:
    for name, one, other in zip(("packed", "scale", "zero"), found, expected, strict=True):
        np.testing.assert_array_equal(one.cpu().numpy(), other, err_msg=name, strict=True)
