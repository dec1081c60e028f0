"""What each function refuses: {function: {a pattern of words in the book's error: the arguments}}."""

from __future__ import annotations

import numpy as np

ONES, NAN, INFINITE = np.ones((2, 3)), np.array([1.0, np.nan]), np.array([[1.0, -np.inf]])

REFUSED: dict[str, dict[str, tuple]] = {
    "keep_largest": {
        "holds NaN": (NAN, 1),
        "or infinity": (INFINITE, 1),
        r"empty.*\(0, 3\)": (np.ones((0, 3)), 0),
        "0 to the 6 weights, got 7": (ONES, 7),
        "got -1": (ONES, -1),
    },
    "global_masks": {
        "holds NaN": ([ONES, NAN], 0.5),
        "or infinity": ([INFINITE, ONES], 0.5),
        "must not be empty": ([ONES, np.ones((0, 3))], 0.5),
        "at least one layer": ([], 0.5),
        r"\[0, 1\).*1.0": ([ONES], 1.0),
        "got -0.1": ([ONES], -0.1),
        "got nan": ([ONES], np.nan),
    },
    "cubic_sparsity": {
        "begin=5, end=5": (5, 5, 5, 0.0, 0.5),
        "begin=9, end=5": (5, 9, 5, 0.0, 0.5),
        "step=nan": (np.nan, 0, 5, 0.0, 0.5),
        "power=0": (5, 0, 9, 0.0, 0.5, 0),
        "got 0.6 and 0.5": (5, 0, 9, 0.6, 0.5),
        r"\[0, 1\).*1.0": (5, 0, 9, 0.6, 1.0),
        r"\[0, 1\).*-0.1": (5, 0, 9, -0.1, 0.5),
        r"\[0, 1\).*nan": (5, 0, 9, 0.0, np.nan),
    },
    "iterative_sparsities": {
        "rounds.*got 0": (0.5, 0),
        r"\[0, 1\).*1.0": (1.0, 3),
        r"\[0, 1\).*-0.5": (-0.5, 1),
        r"\[0, 1\).*nan": (np.nan, 2),
    },
}
