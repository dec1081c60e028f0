"""What the tests of the quantized cache draw: numbers of every temper, halves of a cache, and what those stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tests.conftest import oracle

TEMPERS = {
    "plain": lambda x: x,
    "huge": lambda x: x * (1e3 if x.dtype == np.float16 else 1e30),
    "tiny": lambda x: x * (1e-4 if x.dtype == np.float16 else 1e-30),
    "positive": lambda x: np.abs(x) + 1,
    "constant": lambda x: np.full_like(x, x.flat[0]),
    "some constant": lambda x: np.where(np.arange(x.shape[-2])[:, None] % 2, x.flat[0], x),
    "outlier channel": lambda x: x * np.where(np.arange(x.shape[-1]) == x.shape[-1] // 2, 50, 1),
    "halves between codes": lambda x: np.rint(4 * x) / 2,
}


@st.composite
def numbers(draw, dtypes=(np.float16, np.float32, np.float64)) -> np.ndarray:
    """x `[.., T, D]`, T and D from 1 to 40."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead = draw(st.sampled_from([(), (2,), (1, 2)]))
    x = rng.standard_normal((*lead, *(draw(st.sampled_from([1, 2, 7, 16, 33])) for _ in "TD")))
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    return TEMPERS[draw(st.sampled_from(sorted(TEMPERS)))](x.astype(dtype)).astype(dtype)


def group_by_hand(group: list, bits: int, rule: str) -> tuple[list[int], float, float]:
    """Codes, step and min of one group, number by number in their own precision."""
    kind, top, low = type(group[0]), 2**bits - 1, min(group)
    span = max(group) - low
    with np.errstate(all="ignore"):
        factor = kind(kind(1) / span) * kind(top) if rule == "flexgen" else None
        step = kind(1) / factor if rule == "flexgen" else span / kind(top)
        if span == 0 or step == 0 or (factor is not None and np.isinf(factor)):
            return [0] * len(group), 0.0, low
        scaled = [(one - low) * factor if rule == "flexgen" else (one - low) / step for one in group]
    return [round(float(min(max(one, kind(0)), kind(top)))) for one in scaled], step, low


def quantized_by_hand(x: np.ndarray, bits: int, size: int, per: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and grid of `[T, D]`, group by group; the last group of "flexgen" has zeros behind it."""
    if per == "channel":
        codes, grid = quantized_by_hand(x.T, bits, size, "token", rule)
        return codes.T, grid.swapaxes(0, 1)
    codes, grid = np.empty(x.shape, np.uint8), np.empty((len(x), -(-x.shape[1] // size), 2), x.dtype)
    for row, start in np.ndindex(len(x), grid.shape[1]):
        group = list(x[row, start * size : (start + 1) * size])
        filled = group + [x.dtype.type(0)] * (size - len(group))
        found, *grid[row, start] = group_by_hand(filled, bits, rule)
        codes[row, start * size : (start + 1) * size] = found[: len(group)]
    return codes, grid


def packed_by_hand(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit by bit: the highest bit of a code is the first of its bits, the highest of a byte the first of its eight."""
    rows = codes.reshape(-1, codes.shape[-1])
    digits = ["".join(format(int(code), f"0{bits}b") for code in row) for row in rows]
    held = [[int(row[i : i + 8], 2) for i in range(0, len(row), 8)] for row in digits]
    return np.array(held, np.uint8).reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8)


@dataclass(frozen=True)
class Half:
    """Keys, or values: `held` as the cache remembers them, and `numbers` `[B, Hkv, S, D]`, what that stands for."""

    held: tuple
    numbers: np.ndarray


def half(rng: np.random.Generator, shape: tuple, bits: int, size: int, per: str, packed: int, spare: int = 3) -> Half:
    """S positions, the first `packed` in codes; then come `spare` rows of codes and NaN grids that nobody may use."""
    B, Hkv, S, D = shape
    codes = rng.integers(0, 2**bits, (B, Hkv, packed, D)).astype(np.uint8)
    rows, columns = (packed, -(-D // size)) if per == "token" else (-(-packed // size), D)
    grid = np.stack(
        [rng.uniform(0.5, 1, (B, Hkv, rows, columns)) / 2**bits, rng.uniform(-1, 0, (B, Hkv, rows, columns))], -1
    )
    grid = grid.astype(np.float16).astype(np.float32)
    window = rng.standard_normal((B, Hkv, S - packed, D)).astype(np.float16).astype(np.float32)
    dense = np.empty((B, Hkv, packed, D))
    for b, h, t, d in np.ndindex(*dense.shape):
        step, low = grid[b, h, t, d // size] if per == "token" else grid[b, h, t // size, d]
        dense[b, h, t, d] = float(step) * int(codes[b, h, t, d]) + float(low)
    capacity = packed + spare
    room = np.full((B, Hkv, capacity if per == "token" else -(-capacity // size), columns, 2), np.nan, np.float32)
    room[:, :, :rows] = grid
    held = np.full((B, Hkv, capacity, D * bits // 8), 255, np.uint8)
    held[:, :, :packed] = packed_by_hand(codes, bits)
    made = oracle("quantization.kv_cache").Held(held, room, window, packed, size, per)
    return Half(made, np.concatenate([dense, window], axis=2))


@dataclass(frozen=True)
class Step:
    """One new token's queries, `[B, H, 1, D]`, and the two halves of the cache that it reads."""

    q: np.ndarray
    keys: Half
    values: Half

    def expected(self, scale: float | None = None) -> np.ndarray:
        """Attention head by head over what the codes stand for."""
        (B, H, _, D), Hkv = self.q.shape, self.keys.numbers.shape[1]
        out = np.empty(self.q.shape)
        for b, h in np.ndindex(B, H):
            k, v = (half.numbers[b, h // (H // Hkv)] for half in (self.keys, self.values))
            scores = k @ self.q[b, h, 0].astype(np.float64) * (1 / np.sqrt(D) if scale is None else scale)
            weights = np.exp(scores - scores.max())
            out[b, h, 0] = weights @ v / weights.sum()
        return out


@st.composite
def steps(draw, longest: int = 40, one_room: bool = False) -> Step:
    """Heads, head sizes, lengths; bits, groups and seams, of keys and values each (one_room: one capacity)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    B, H, Hkv = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 4, 2), (1, 3, 1), (1, 2, 2)]))
    D, S = draw(st.sampled_from([8, 16, 24, 32])), draw(st.integers(1, longest))
    halves, packed = [], [draw(st.integers(0, S)) for _ in "kv"]
    for first in packed:
        bits, size = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([4, 8, 32]))
        spare = 3 + max(packed) - first if one_room else draw(st.integers(0, 3))
        halves.append(half(rng, (B, Hkv, S, D), bits, size, draw(st.sampled_from(["token", "channel"])), first, spare))
    q = rng.standard_normal((B, H, 1, D)) * draw(st.sampled_from([1, 1, 100]))  # 100: scores of hundreds
    return Step(q.astype(np.float16).astype(np.float32), *halves)
