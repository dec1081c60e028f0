"""What each function refuses: {function: {a pattern of words in the book's error: the arguments}}."""

from __future__ import annotations

import numpy as np

ONES = np.ones((4, 16))
PAIRS = np.tile([1.0, 0, 0, 1], (4, 8))
VALUES, METADATA = np.ones((4, 16)), np.full((4, 2), 0x4444, dtype=np.int16)  # positions 0 and 1 in every group
PACKED = np.zeros((1, 2, 1, 4), dtype=np.int32)  # position 0 for every value

REFUSED: dict[str, dict[str, tuple]] = {
    "n_m_mask": {
        "18 columns.*m=4": (np.ones((2, 18)), 2, 4),
        "n=5, m=4": (ONES, 5, 4),
        "n=0": (ONES, 0, 4),
        r"\(16,\)": (np.ones(16), 2, 4),
        r"\(0, 16\)": (np.ones((0, 16)), 2, 4),
        "holds NaN": (np.full((1, 4), np.nan), 2, 4),
        "or infinity": (np.full((1, 4), -np.inf), 2, 4),
    },
    "block_mask": {
        r"\[0, 1\).*1.0": (ONES, 1.0, 4),
        "-0.1": (ONES, -0.1, 4),
        "-0.001": (ONES, -0.001, 4),
        "got nan": (ONES, np.nan, 4),
        "one of 16 blocks.*0.99": (ONES, 0.99, 4),
        "4 rows.*rows=3": (ONES, 0.5, 3),
        "rows=0": (ONES, 0.5, 0),
        "holds NaN": (np.full((4, 4), np.nan), 0.5, 4),
        "or infinity": (np.full((4, 4), -np.inf), 0.5, 4),
        r"\(0, 4\)": (np.ones((0, 4)), 0.5, 4),
    },
    "compress": {
        "not 2:4.*row 0, columns 0 to 3": (ONES,),
        "not 2:4.*row 0, columns 20 to 23": (PAIRS + np.eye(4, 32, 21),),
        "not 2:4.*row 2, columns 8 to 11": (PAIRS + np.outer(np.arange(4) == 2, np.arange(32) == 9),),
        "24 columns.*16": (PAIRS[:, :24],),
        "16 columns.*32": (PAIRS[:, :16].astype(np.int8),),
        "NaN": (np.where(PAIRS == 1, np.nan, 0),),
        "infinity": (np.where(PAIRS == 1, -np.inf, 0),),
    },
    "sparse_matmul": {
        r"x must be \[tokens, 32\].*\(1, 31\)": (np.ones((1, 31)), VALUES, METADATA),
        r"x must be.*\(1, 48\)": (np.ones((1, 48)), VALUES, METADATA),
        r"x must be.*\(32,\)": (np.ones(32), VALUES, METADATA),
        r"int32 \(4, 2\)": (np.ones((1, 32)), VALUES, METADATA.astype(np.int32)),
        r"\(4, 14\)": (np.ones((1, 32)), VALUES[:, :14], METADATA),
        "do not ascend": (np.ones((1, 32)), VALUES, METADATA ^ 0xF),
    },
    "decompress": {
        r"int32 \(4, 2\)": (VALUES, METADATA.astype(np.int32)),
        r"\(4, 14\)": (VALUES[:, :14], METADATA),
        "do not ascend": (VALUES, METADATA ^ 0xF),
    },
    "compress_n_m": {
        "not 1:4.*row 0, columns 0 to 3": (PAIRS, 1, 4),
        "not 2:4.*row 0, columns 0 to 3 hold": (np.array([[1.0, 1, 1, 0]]), 2, 4),
        "not 2:8.*row 1, columns 16 to 23": (PAIRS * (np.arange(32) % 8 < 4) + np.eye(4, 32, 15 + 4), 2, 8),
        "32 columns.*m=3": (PAIRS, 2, 3),
        "from 2 to 16.*32": (PAIRS, 16, 32),
        "n=5, m=4": (PAIRS, 5, 4),
        "n=0": (PAIRS * 0, 0, 4),
        "NaN": (np.where(PAIRS == 1, np.nan, 0), 2, 4),
    },
    "matmul_n_m": {
        r"x must be \[tokens, 64\].*\(1, 32\)": (np.ones((1, 32)), VALUES, PACKED, 1, 4),
        r"x must be.*\(64,\)": (np.ones(64), VALUES, PACKED, 1, 4),
        r"packed must be int32 \(1, 3, 1, 4\)": (np.ones((1, 128)), VALUES, PACKED, 1, 8),
        "got int64": (np.ones((1, 64)), VALUES, PACKED.astype(np.int64), 1, 4),
        "2:4.*do not|do not ascend": (np.ones((1, 32)), VALUES, PACKED, 2, 4),
        "below m=3": (np.ones((1, 48)), VALUES, ~PACKED, 1, 3),
        "groups · 3": (np.ones((1, 64)), VALUES, PACKED, 3, 4),
    },
    "cutlass_offsets": {
        "divisible by 32.* got 4 and 2": (METADATA,),
        "divisible by 16.* got 24 and 2": (np.zeros((24, 2), np.int32),),
        "divisible by 32.* got 48 and 2": (np.zeros((48, 2), np.int16),),
        "even words, got 32 and 3": (np.zeros((32, 3), np.int16),),
        "even words, got 16 and 1": (np.zeros((16, 1), np.int32),),
    },
}
