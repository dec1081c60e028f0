"""What the tests of the quantizers draw: layers of every shape and temper, and what they are held against."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.conftest import oracle

TEMPERS = {
    "plain": lambda w: w,
    "huge": lambda w: w * 1e30,
    "tiny": lambda w: w * 1e-30,
    "positive": np.abs,
    "constant rows": lambda w: np.broadcast_to(w[:, :1], w.shape).copy(),
    "some rows zero": lambda w: w * (np.arange(len(w)) % 2)[:, None],
    "outlier column": lambda w: w * np.where(np.arange(w.shape[1]) == w.shape[1] // 2, 50, 1),
}


def keep_only(function: str, chapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the chapter of GPTQ, let every exercise but `function` be the book's, written yet or not."""
    book = oracle("quantization.gptq")
    for name in {"find_grid", "quantize", "inverse_factor", "gptq", "obq"} - {function}:
        monkeypatch.setattr(chapter, name, getattr(book, name))


@dataclass(frozen=True)
class Layer:
    """weight `[out, in]`, calibration inputs x `[tokens, in]` and their Hessian `[in, in]`."""

    weight: np.ndarray
    x: np.ndarray

    @property
    def hessian(self) -> np.ndarray:
        return 2 * self.x.T @ self.x


@dataclass(frozen=True)
class Product:
    """x `[tokens, in]` and packed weights `[out, in]`: codes `[out, in]`, scale and zero `[out, in / group_size]`."""

    x: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group_size: int
    bits: int

    def weights(self) -> tuple:
        """The arguments of `weight_only_matmul` after x; what packs them is the book, whatever is under test."""
        packed = oracle("quantization.weight_only").pack(self.codes, self.bits)
        return packed, self.scale, self.zero, self.group_size, self.bits

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The array arguments of `weight_only_matmul`."""
        return self.x, *self.weights()[:3]

    def largest_term(self) -> float:
        """No product that is summed is larger."""
        return float(np.abs(self.x).max() * 15 * self.scale.max())


GROUPS = {  # bits: (groups, runs of 32 columns in each)
    4: [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3), (3, 3)],
    3: [(4, 1), (2, 2), (1, 4), (2, 4)],
    2: [(2, 1), (6, 1), (1, 2), (3, 2)],
}


@st.composite
def products(draw, tokens) -> Product:
    """Rows, groups and runs of 32 columns, few of them a power of two; a group may end inside a span."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits, rows = draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([1, 2, 7, 9]))
    groups, runs = draw(st.sampled_from(GROUPS[bits]))
    shape, columns = (rows, groups), groups * runs * 32
    return Product(
        x=rng.standard_normal((draw(tokens), columns)).astype(np.float32),
        codes=rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8),
        scale=rng.uniform(0.01, 0.1, shape).astype(np.float32),
        zero=rng.integers(0, 16, shape).astype(np.uint8),
        group_size=runs * 32,
        bits=bits,
    )


@st.composite
def layers(draw, columns: tuple[int, ...] = (1, 2, 7, 12, 16, 17, 24), dead: bool = True) -> Layer:
    """Inputs are correlated, their channels differ in size by up to 30, and with `dead` some may be zero throughout."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, wide = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from(columns))
    weight = TEMPERS[draw(st.sampled_from(sorted(TEMPERS)))](rng.standard_normal((rows, wide)))
    x = rng.standard_normal((2 * wide + 3, wide)) @ (np.eye(wide) + 0.3 * rng.standard_normal((wide, wide)))
    x *= np.exp(rng.uniform(-1.7, 1.7, wide))
    if dead and draw(st.booleans()):
        x[:, rng.permutation(wide)[: wide // 4]] = 0
    return Layer(weight, x)


def packed_by_hand(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """The packed layout bit by bit. Column 4 i + w of a run has its bits in nibble i of words w of the run's quads.

    A row of W holds `planes` parts, in each of them four words for every span of columns.
    """
    columns = codes.shape[1]
    runs, planes = {2: (2, 1), 3: (4, 3), 4: (1, 1)}[bits]
    words = [[0] * (columns * bits // 32) for _ in codes]
    for (row, column), code in np.ndenumerate(codes):
        spans, span, run = columns // (32 * runs), column // (32 * runs), column // 32 % runs
        place, word = column % 32 // 4, column % 4
        for bit in range(bits):
            top = bits == 3 and bit == 2
            plane, inside = (2, run) if top else (run // 2, bit + (2 * (run % 2) if bits < 4 else 0))
            index = ((plane if planes > 1 else 0) * spans + span) * 4 + word
            words[row][index] += (int(code) >> bit & 1) * 2 ** (4 * place + inside)
    return np.array(words, np.uint32).view(np.int32)


def range_of_row(row: np.ndarray, symmetric: bool) -> tuple[float, float]:
    """The ends of one row's grid, by the words of the definition."""
    low, high = min(0.0, *row.tolist()), max(0.0, *row.tolist())
    if symmetric and low < 0:
        low, high = -max(high, -low), max(high, -low)
    return (-1.0, 1.0) if low == high == 0 else (low, high)


def grid_between(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero of the grid from low to high."""
    scale = (high - low) / (2**bits - 1)
    return scale, 2 ** (bits - 1) if symmetric else round(-low / scale)


def grid_of_row(row: np.ndarray, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero of one row."""
    return grid_between(*range_of_row(row, symmetric), bits, symmetric)


def nearest(value: float, scale: float, zero: int, bits: int) -> int:
    """The nearest code to one weight; Python's round takes halves to the even number."""
    return min(max(round(value / scale) + zero, 0), 2**bits - 1)


def column_by_column(
    layer: Layer, bits: int, group_size: int | None, symmetric: bool, act_order: bool, static: bool, damping: float,
    block: int,
) -> np.ndarray:  # fmt: skip
    """GPTQ's codes without its speed-ups: row by row, and the inverse Hessian itself shrinks after every column.

    This is OBQ's step (eliminate one row and column of the inverse) in GPTQ's order. Blocks matter for groups only:
    a group's grid is fitted to the weights as they were when the current block began.
    """
    hessian, columns = layer.hessian, layer.weight.shape[1]
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    live = np.where(dead, 0, layer.weight)
    order = sorted(range(columns), key=lambda j: -hessian[j, j]) if act_order else list(range(columns))
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns)
    codes = np.empty(layer.weight.shape, np.uint8)
    for row in range(len(codes)):
        inverse, w = np.linalg.inv(damped[np.ix_(order, order)]), live[row, order]
        before = w.copy()
        for i, column in enumerate(order):
            if i % block == 0:
                before = w.copy()
            if group_size is None:
                grid = grid_of_row(layer.weight[row], bits, symmetric)
            elif static:
                start = column // group_size * group_size
                grid = grid_of_row(live[row, start : start + group_size], bits, symmetric)
            elif i % group_size == 0:
                grid = grid_of_row(before[i : i + group_size], bits, symmetric)
            codes[row, column] = nearest(w[i], *grid, bits)
            error = w[i] - grid[0] * (float(codes[row, column]) - grid[1])
            w[i + 1 :] -= error * inverse[i, i + 1 :] / inverse[i, i]
            inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def cheapest_first(layer: Layer, bits: int, damping: float) -> np.ndarray:
    """OBQ's codes row by row: the inverse of what is left of the Hessian is computed anew for every weight."""
    hessian, columns = layer.hessian, layer.weight.shape[1]
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    live = np.where(dead, 0, layer.weight)
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns)
    codes = np.empty(layer.weight.shape, np.uint8)
    for row, w in enumerate(live):
        scale, zero = grid_of_row(w, bits, False)
        codes[row], w = zero, w.copy()
        left = [j for j in range(columns) if w[j] != 0]  # zeros are set aside and keep the code of 0
        while left:
            inverse = np.linalg.inv(damped[np.ix_(left, left)])
            errors = [w[j] - scale * (nearest(w[j], scale, zero, bits) - zero) for j in left]
            if max(abs(error) for error in errors) > scale / 2:
                pick = max(range(len(left)), key=lambda i: abs(errors[i]))
            else:
                pick = min(range(len(left)), key=lambda i: errors[i] ** 2 / inverse[i, i])
            codes[row, left[pick]] = nearest(w[left[pick]], scale, zero, bits)
            w[left] -= inverse[:, pick] * errors[pick] / inverse[pick, pick]
            left.pop(pick)
    return codes
