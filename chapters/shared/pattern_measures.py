"""What the chapter on sparse patterns measures with: what a mask costs, how far it carries, and figures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from chapters.figures import COLOURS, legend, panels, series
from chapters.lab import Lab
from chapters.shared.block_masks import BlockMask
from minitfm.evaluate import perplexity
from minitfm.model import Attend


def costs(mask: BlockMask, head_size: int = 64) -> dict[str, float]:
    """What one head costs: pairs that are seen, blocks that are visited, both also as shares of all, and operations.

    Operations: 4 for each channel of each pair in a visited block, whether it is seen or not.
    """
    heads, area = len(mask.full), mask.block_q * mask.block_k
    pairs = (mask.tokens.sum() + mask.full.sum() * area) / heads
    visited = (mask.partial | mask.full).sum() / heads
    return {
        "pairs": float(pairs),
        "share of pairs": float(pairs / math.prod(mask.shape)),
        "blocks": float(visited),
        "share of blocks": float(visited * heads / mask.full.size),
        "operations": float(4 * head_size * area * visited),
    }


def layers_needed(seen: np.ndarray, wanted: np.ndarray | None = None) -> float:
    """Layers until each token can hold something of every token that it is wanted from: its connectivity.

    seen, wanted `[N, N]` bool; wanted: the past, if not given. A layer passes on what it sees, and a token keeps its
    own. Infinity where layers never suffice.
    """
    wanted = np.tri(len(seen), dtype=bool) if wanted is None else wanted
    one = (seen | np.eye(len(seen), dtype=bool)).astype(np.float32)
    reached, layers = one, 1
    while not (reached > 0)[wanted].all():
        further = (one @ reached > 0).astype(np.float32)
        if np.array_equal(further, reached):
            return math.inf
        reached, layers = further, layers + 1
    return layers


def relative_costs(
    ways: dict[str, tuple[Attend, BlockMask]], n: int, repeats: int = 3, heads: int = 4, head_size: int = 64
) -> dict[str, dict[str, float]]:
    """Time, live blocks and pairs of each way over n tokens, as shares of the first way's: {name: {"time": …, …}}.

    Time is the least of `repeats` of this process's own, which other processes disturb less than the clock's.
    """
    q, k, v = torch.randn(3, 1, heads, n, head_size, generator=torch.Generator().manual_seed(0)).unbind()
    found: dict[str, dict[str, float]] = {}
    for name, (attend, mask) in ways.items():
        marks = [time.process_time()]
        with torch.no_grad():
            for _ in range(repeats + 1):  # the first one makes the plan
                attend(q, k, v)
                marks.append(time.process_time())
        counted = costs(mask, head_size)
        found[name] = {"time": min(np.diff(marks)[1:]), "blocks": counted["blocks"], "pairs": counted["pairs"]}
    first = next(iter(found.values()))
    return {name: {key: value / first[key] for key, value in shares.items()} for name, shares in found.items()}


def explained(shares: dict[str, dict[str, float]], key: str) -> float:
    """Share of the variance of "time" that a line through `key` explains."""
    x, y = (np.array([found[what] for found in shares.values()]) for what in (key, "time"))
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def perplexity_ratio(lab: Lab, attends: Sequence[Attend], sequences: int) -> float:
    """Mean perplexity of the base model with each attention, over its own, on the first `sequences` of `validation`."""
    text = lab.validation[:sequences]
    base = lab.once(("patterns: base perplexity", sequences), lambda: perplexity(lab.model(), text))
    return float(np.mean([perplexity(lab.model(attend=attend), text) / base for attend in attends]))


def draw_mask(axes: Axes, mask: BlockMask, head: int = 0) -> None:
    """A picture of a mask: pairs that are seen dark, in full blocks darkest; computed in vain pale; skipped white."""
    area, (T, S) = np.ones((mask.block_q, mask.block_k), dtype=int), mask.shape
    partial, full = (np.kron(grid[head], area)[:T, :S] for grid in (mask.partial, mask.full))
    state = partial * (1 + mask.dense()[head]) + 3 * full
    colours = ["white", "#cfe0ee", COLOURS["second"], COLOURS["method"]]
    axes.grid(False)
    axes.imshow(state, cmap=ListedColormap(colours), vmin=0, vmax=3, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def draw(shares: dict[str, dict[str, float]], worse: dict[str, float]) -> Figure:
    """Left: time by live blocks and by pairs. Right: what patterns cost the base model."""
    fig, (left, right) = panels(2, width=7.6, height=2.9)
    for key, role in (("pairs", "muted"), ("blocks", "method")):
        x, y = ([found[what] for found in shares.values()] for what in (key, "time"))
        left.plot(x, y, **series(role), label=key)[0].set_linestyle("")
    left.plot([0, 1], [0, 1], **series("reference"))
    left.set(xlabel="pairs or blocks, full = 1", ylabel="time, full = 1")
    legend(left)
    names = sorted(worse, key=worse.__getitem__)
    right.barh(names, [worse[name] - 1 for name in names], left=1, color=COLOURS["method"])
    right.set(xlabel="perplexity, all keys = 1")
    return fig
