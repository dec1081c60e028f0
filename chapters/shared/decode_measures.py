"""What the chapter on Flash-Decoding measures with: the model's own queries and keys, timings, and its figure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from minitfm.model import causal_attention

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Linear = Callable[[Tensor, Tensor], Tensor]


def record_attention(lab: Lab, tokens: Tensor) -> list[Arrays]:
    """q `[B, H, T, D]`, k and v `[B, Hkv, T, D]` of each layer of the base model reading `tokens` `[B, T]`, float32."""
    seen: list[Arrays] = []

    def listen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.numpy(), k.numpy(), v.numpy()))
        return causal_attention(q, k, v)

    with torch.no_grad():
        lab.model(attend=listen)(tokens)
    return seen


def visible_scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """All scaled scores of queries with keys that they see, flat; q `[B, H, T, D]`, k `[B, Hkv, T, D]`."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    return scores[..., np.tri(q.shape[2], dtype=bool)].ravel()


def linears(device: str = "cpu") -> dict[str, Linear]:
    """Ways to compute x weightᵀ, x `[M, K]` and weight `[N, K]`; one that cannot serve a shape raises ValueError."""
    ways: dict[str, Linear] = {
        "product": F.linear,
        "row by row": lambda x, weight: torch.stack([weight @ row for row in x]),
        "flat": lambda x, weight: (weight @ x.T).T,
    }
    if device == "cuda":
        from kernels.attention.flash_decoding import flat_matmul

        ways["flat"] = flat_matmul
    return ways


def timings(run: Callable[[], Tensor], device: str, repeats: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each of `repeats` calls by `clock`, after one call to warm up; on "cuda" until the GPU is done."""
    run()
    marks = []
    for left in range(repeats, -1, -1):
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(clock())
        if left:
            run()
    return [after - before for before, after in pairwise(marks)]


def draw(occupancy: Callable, scores: np.ndarray, limits: tuple[float, float]) -> Figure:
    """Left: how busy a GPU is by batch, whole and split; right: logits, and a range as wide as `limits` around them."""
    drawn, (left, right) = panels(2, width=7.6, height=2.8)
    batches = range(1, 33)
    for label, role, shares in zip(("one run", "split"), ("baseline", "method"), occupancy(batches, 8192), strict=True):
        left.plot(batches, shares, **series(role), markevery=5, label=label)
    left.set(xlabel="batch, 8 key heads, 8,192 keys", ylabel="multiprocessors busy", ylim=(0, 1.05))
    legend(left)
    right.hist(scores, bins=30, color=COLOURS["method"], log=True)
    middle, half = (scores.min() + scores.max()) / 2, (limits[1] - limits[0]) / 2
    right.axvspan(middle - half, middle + half, color=COLOURS["muted"], alpha=0.3, label="what float16 carries")
    right.set(xlabel="logit, all layers", ylabel="pairs of tokens")
    legend(right, loc="lower center")
    return drawn
