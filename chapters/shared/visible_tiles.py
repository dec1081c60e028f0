"""Which keys a query sees, with windows and with sequences end to end in one row; and so, which tiles hold anything.

Query i of a sequence with T queries and S keys has its own place among the keys, p = i + S − T: the last query stands
beside the last key. It sees the keys j with −left <= j − p <= right. Queries and keys of all sequences are counted
through; p − i is then the difference of a sequence's ends, whatever comes before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

Window = tuple[int | None, int | None]
Offsets = Sequence[int] | np.ndarray | Tensor
Span = tuple[slice, slice]  # the queries and the keys of a sequence


def reach(causal: bool = True, window: Window = (None, None)) -> tuple[float, float]:
    """(left, right): how many keys before and after its own place a query sees, inf for all; causal makes right 0.

    Raises ValueError unless each half of the window is None or an integer of at least 0.
    """
    if len(window) != 2 or any(side is not None and not (side >= 0 and side == int(side)) for side in window):
        raise ValueError(f"window must be (left, right), each None or an integer of at least 0, got {window}")
    left, right = (math.inf if side is None else int(side) for side in window)
    return left, 0 if causal else right


def spans(T: int, S: int, cu_q: Offsets | None = None, cu_k: Offsets | None = None) -> list[Span]:
    """(queries, keys) of each sequence; without offsets there is one, of all T and all S. cu_k None: as cu_q.

    A sequence may lack queries, keys or both. Raises TypeError for offsets that are not integers, ValueError unless
    they rise from 0 to T and from 0 to S, never fall, and are for as many sequences.
    """
    if cu_q is None:
        if cu_k is not None:
            raise ValueError("cu_q must be given with cu_k, got None")
        return [(slice(0, T), slice(0, S))]
    queries, keys = cut("cu_q", cu_q, T), cut("cu_k", cu_q if cu_k is None else cu_k, S)
    if len(queries) != len(keys):
        raise ValueError(f"cu_q and cu_k must be equally long, got {len(queries) + 1} and {len(keys) + 1} offsets")
    return list(zip(queries, keys, strict=True))


def cut(name: str, offsets: Offsets, end: int) -> list[slice]:
    """0 .. end, cut at the offsets. Raises as `spans` says, in the name of the argument."""
    cuts = np.asarray(offsets.cpu() if isinstance(offsets, Tensor) else offsets)
    if cuts.dtype.kind != "i":
        raise TypeError(f"{name} must be integers, got {cuts.dtype}")
    if cuts.ndim != 1 or len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != end or (np.diff(cuts) < 0).any():
        raise ValueError(f"{name} must be [N + 1], rise from 0 to {end} and never fall, got {cuts.tolist()}")
    return [slice(*pair) for pair in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]


def runs(start: int, stop: int, block: int) -> list[slice]:
    """start .. stop in runs of `block`, the last perhaps shorter; none unless stop lies past start."""
    return [slice(first, min(first + block, stop)) for first in range(start, stop, block)]


def query_tiles(sequences: list[Span], left: float, right: float, block_q: int) -> Iterator[tuple[slice, slice, int]]:
    """(rows, seen, shift): each tile of queries, the run of keys that some of them see, and p − i.

    `seen` is empty, its stop before its start perhaps, where they see none.
    """
    for queries, keys in sequences:
        shift = keys.stop - queries.stop
        for rows in runs(queries.start, queries.stop, block_q):
            first, last = max(rows.start + shift - left, keys.start), min(rows.stop + shift + right, keys.stop)
            yield rows, slice(int(first), int(last)), shift


def distances(rows: slice, columns: slice, shift: int) -> np.ndarray:
    """j − p of each pair, int `[rows, columns]`."""
    return np.arange(columns.start, columns.stop) - np.arange(rows.start, rows.stop)[:, None] - shift
