"""What FlashAttention's variants refuse beyond what `flash` does, with the words of the book's own errors."""

from __future__ import annotations

import math

import numpy as np

from tests.attention.refused import wrong_input

SHAPES = {"q": (1, 4, 3, 8), "k": (1, 2, 5, 8), "v": (1, 2, 5, 8)}
BAD_OPTIONS: list[tuple[dict, type[Exception], str]] = [
    ({"window": (-1, None)}, ValueError, "window must be"),
    ({"window": (None, -3)}, ValueError, "window must be"),
    ({"window": (1.5, None)}, ValueError, "window must be"),
    ({"window": (3,)}, ValueError, "window must be"),
    ({"softcap": 0.0}, ValueError, "softcap must be"),
    ({"softcap": -2.0}, ValueError, "softcap must be"),
    ({"softcap": math.inf}, ValueError, "softcap must be"),
    ({"softcap": math.nan}, ValueError, "softcap must be"),
    ({"slopes": np.ones(2)}, ValueError, "slopes must be"),
    ({"slopes": np.ones((1, 4))}, ValueError, "slopes must be"),
    ({"cu_k": [0, 5]}, ValueError, "cu_q must be"),
    ({"cu_q": [0, 2], "cu_k": [0, 5]}, ValueError, "cu_q must be"),
    ({"cu_q": [1, 3], "cu_k": [0, 5]}, ValueError, "cu_q must be"),
    ({"cu_q": [0, 3], "cu_k": [0, 6]}, ValueError, "cu_k must be"),
    ({"cu_q": [0, 3]}, ValueError, "cu_k must be"),
    ({"cu_q": [0, 2, 1, 3], "cu_k": [0, 1, 2, 5]}, ValueError, "cu_q must be"),
    ({"cu_q": [3], "cu_k": [5]}, ValueError, "cu_q must be"),
    ({"cu_q": [0, 1, 3], "cu_k": [0, 5]}, ValueError, "equally long"),
    ({"cu_q": [0.0, 3.0], "cu_k": [0, 5]}, TypeError, "cu_q must be integers"),
]
NOT_FINITE = [({"slopes": np.array([1, 1, bad, 1])}, ValueError, "slopes must be") for bad in (math.nan, math.inf)]


def refusals() -> list[tuple[dict[str, np.ndarray], dict, type[Exception], str]]:
    """(q, k and v, options, error, its words), for the reference."""
    arrays = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    found = [(arrays, *case) for case in BAD_OPTIONS + NOT_FINITE]
    two = {name: np.zeros((2, *shape[1:])) for name, shape in SHAPES.items()}
    found.append((two, {"cu_q": [0, 3], "cu_k": [0, 5]}, ValueError, "batch of 1"))
    return found + [(*case, ".") for case in wrong_input()[::3]]
