"""What FlashAttention refuses: shapes of q, k and v, options and dtypes, with the words of the book's own errors."""

from __future__ import annotations

import itertools
import math

import numpy as np

GOOD = {"q": (1, 4, 3, 8), "k": (1, 2, 5, 8), "v": (1, 2, 5, 8)}
BAD_SHAPES = {
    "k and v|k must be": [
        {"k": (2, 2, 5, 8), "v": (2, 2, 5, 8)},
        {"k": (1, 3, 5, 8), "v": (1, 3, 5, 8)},
        {"k": (1, 2, 5, 9), "v": (1, 2, 5, 9)},
        {"v": (1, 2, 6, 8)},
    ],
    "q must be 4-D": [{"q": (4, 3, 8)}, {"q": (1, 4, 0, 8)}],
    "v must be 4-D": [{"v": (1, 2, 5)}, {"v": (0, 2, 5, 8)}],
}
BAD_OPTIONS = [
    {"scale": 0.0},
    {"scale": -1.0},
    {"scale": math.inf},
    {"scale": math.nan},
    {"block_q": -16},
    {"block_q": 0},
    {"block_k": 0},
    {"block_k": -16},
]


def refusals() -> list[tuple[dict, dict, str]]:
    """(shapes, options, words of the error), each a ValueError."""
    shapes = [(GOOD | changed, {}, words) for words, cases in BAD_SHAPES.items() for changed in cases]
    return shapes + [(GOOD, option, f"{next(iter(option))} must be") for option in BAD_OPTIONS]


def wrong_input() -> list[tuple[dict[str, np.ndarray], dict, type[Exception]]]:
    """(q, k and v, options, error): shapes, options and dtypes that do not fit, or that the reference does not take."""
    found = [({name: np.zeros(shape) for name, shape in shapes.items()}, options) for shapes, options, _ in refusals()]
    dtypes = (np.int64, np.complex128, np.float16, np.bool_, np.float32)
    wrong = [
        {other: np.zeros(shape, dtype if other == name else np.float64) for other, shape in GOOD.items()}
        for name, dtype in itertools.product(GOOD, dtypes)
    ]
    return [(*case, ValueError) for case in found] + [(arrays, {}, TypeError) for arrays in wrong]


def wrong_input_going_back() -> list[tuple[dict[str, np.ndarray], dict, type[Exception]]]:
    """The same with a dout, out and lse that fit q; then good input of which one of these three does not."""
    cases = [(going_back(**arrays), options, error) for arrays, options, error in wrong_input()]
    good = going_back(**{name: np.zeros(shape) for name, shape in GOOD.items()})
    return cases + [(good | {name: good[name][:, :1]}, {}, ValueError) for name in ("dout", "out", "lse")]


def going_back(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    """Arguments of a backward pass whose dout, out and lse fit q."""
    return {"dout": q, "q": q, "k": k, "v": v, "out": q, "lse": q[..., 0]}
