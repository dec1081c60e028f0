"""The pictures of the chapter on channel permutation: what masks drop, before and after, and what searches reach."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chapters.figures import COLOURS, panels

Array = np.ndarray


def draw_mask(axes: Axes, weight: Array, mask: Array, title: str) -> None:
    """A mask: white where a weight is kept, darker the larger one is that is dropped; lines between stripes of four."""
    limit = float(np.quantile(np.abs(weight), 0.9)) or 1.0
    axes.imshow(np.where(mask, 0, np.abs(weight)), cmap="Greys", vmin=0, vmax=limit, interpolation="nearest")
    for column in range(4, weight.shape[1], 4):
        axes.axvline(column - 0.5, color=COLOURS["baseline"], linewidth=0.6)
    axes.grid(False)
    axes.set(title=title, xlabel="input", ylabel="output", xticks=[], yticks=[])


def picture(
    weight: Array, search: Callable[[Array], Array], mask: Callable[[Array], Array], ranking: dict[str, float]
) -> Figure:
    """What `mask` drops of a corner of weight `[out, in]`, as it is and as `search` reorders it; then efficacies."""
    drawn, (left, middle, right) = panels(3, width=9.8, height=3.0, width_ratios=(1, 1, 1.2))
    corner = weight[:32, :32]
    reordered = corner[:, search(corner)]
    draw_mask(left, corner, mask(corner), "dropped, as stored")
    draw_mask(middle, reordered, mask(reordered), "dropped, reordered")
    right.barh(list(ranking)[::-1], list(ranking.values())[::-1], color=COLOURS["method"])
    right.set(title="random 32 × 16 matrices", xlabel="efficacy (%)", xlim=(0, 60))
    right.tick_params(axis="y", labelsize=8)
    return drawn
