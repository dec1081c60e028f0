"""The book's figures: one style, readable in greyscale and on a phone, and no global state.

Figures are plain matplotlib `Figure` objects that a notebook shows as the last expression of a cell, with or without
pyplot. Give a series the colour, marker and line style of its role, so that it can be told apart without colour:

    fig, axes = figure()
    axes.plot(bits, perplexity, **series("method"), label="GPTQ")
    axes.set(xlabel="bits per weight", ylabel="perplexity", title="3 bits suffice")
    legend(axes)
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

COLOURS = {  # by role; their lightness differs, so they stay apart in greyscale
    "reference": "#1b1b1b",
    "method": "#0b4f8a",
    "baseline": "#d9730d",
    "accent": "#a3184f",
    "second": "#1f8f73",
    "third": "#7a5bb5",
    "muted": "#8a9199",
}
MARKERS = {
    "reference": "",
    "method": "o",
    "baseline": "s",
    "accent": "^",
    "second": "D",
    "third": "v",
    "muted": "x",
}
LINESTYLES = {
    "reference": "--",
    "method": "-",
    "baseline": "-.",
    "accent": ":",
    "second": (0, (5, 1)),
    "third": (0, (3, 1, 1, 1)),
    "muted": "-",
}
TEXT_SIZE = 11  # points
GRID, INK = "#d9dde1", "#33383d"
RESOLUTION = 144  # dots per inch: sharp on a phone's screen
SHADES = 256  # colours of a PNG: no difference can be seen, and a figure takes about 12 KB instead of 35


class BookFigure(Figure):
    """A matplotlib Figure that notebooks show by itself, without pyplot."""

    def draw(self, renderer: RendererBase) -> None:
        """Draw the figure, with short logarithmic axes labelled in plain numbers."""
        for axes in self.axes:
            label_short_log(axes.xaxis)
            label_short_log(axes.yaxis)
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        return save_png_bytes(self)


def figure(width: float = 6.4, height: float = 3.6) -> tuple[Figure, Axes]:
    """An empty figure of `width` by `height` inches in the book's style, and its axes."""
    drawn = BookFigure(figsize=(width, height), layout="constrained", facecolor="white")
    return drawn, style(drawn.add_subplot())


def panels(columns: int, width: float = 6.4, height: float = 3.0, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` axes side by side; `sharey=True` and the like pass to matplotlib."""
    drawn = BookFigure(figsize=(width, height), layout="constrained", facecolor="white")
    return drawn, [style(axes) for axes in np.atleast_1d(drawn.subplots(1, columns, **shared))]


def style(axes: Axes) -> Axes:
    """Give axes the book's look: a light grid behind the data, no box, text that stays readable on a phone."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=TEXT_SIZE)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_fontsize(TEXT_SIZE + 1)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_prop_cycle(color=[COLOURS[role] for role in ("method", "baseline", "accent", "second", "third")])
    return axes


def label_short_log(axis: Axis) -> None:
    """Give a logarithmic axis of less than two decades at least three plain numbers, unless it has ticks of its own."""
    low, high = sorted(axis.get_view_interval())
    default = isinstance(axis.get_major_locator(), LogLocator) and isinstance(axis.get_major_formatter(), LogFormatter)
    ten = axis.get_scale() == "log" and getattr(axis.get_transform(), "base", None) == 10
    if not (default and ten and 0 < low < high < 100 * low):
        return
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    few, more = (np.outer(decades, steps).ravel() for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)))
    for ticks in (few, more, np.array(MaxNLocator(4).tick_values(low, high))):
        inside = ticks[(low <= ticks) & (ticks <= high)]
        if len(inside) >= 3:
            axis.set_ticks(inside, [f"{tick:g}" for tick in inside])
            axis.set_minor_formatter(NullFormatter())
            return


def series(role: str) -> dict[str, Any]:
    """Keywords for `axes.plot` that draw a line in its role. Raises ValueError for an unknown role."""
    if role not in COLOURS:
        raise ValueError(f"role must be one of {', '.join(COLOURS)}, got {role!r}")
    return {"color": COLOURS[role], "marker": MARKERS[role], "linestyle": LINESTYLES[role], "markersize": 5}


def legend(axes: Axes, **options: Any) -> Legend:
    """A legend without a frame, readable over lines and grid; `options` pass to matplotlib."""
    return axes.legend(**({"framealpha": 0.85, "edgecolor": "none", "fontsize": TEXT_SIZE} | options))


def heatmap(axes: Axes, values: np.ndarray, label: str, limit: float | None = None, digits: int | None = None) -> None:
    """Draw a matrix `[rows, columns]` as coloured cells with a colour bar called `label`.

    Values of both signs get diverging colours that are white at zero, others a sequential scale. NaN cells stay
    grey. `limit` fixes the largest magnitude shown; `digits` writes the numbers into the cells.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values must be a non-empty matrix, got shape {values.shape}")
    finite = values[np.isfinite(values)]
    largest = limit or float(np.abs(finite).max(initial=0)) or 1.0
    signed = bool((finite < 0).any())
    norm = Normalize(-largest if signed else 0, largest)
    axes.grid(False)
    axes.set_facecolor(GRID)
    colours = "RdBu_r" if signed else "cividis"
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.figure.colorbar(image, ax=axes, label=label)
    if digits is not None:
        write_numbers(axes, values, digits, largest, signed)


def write_numbers(axes: Axes, values: np.ndarray, digits: int, largest: float, signed: bool) -> None:
    """Write each value into its cell, light on dark."""
    for (row, column), value in np.ndenumerate(values):
        dark = abs(value) > 0.6 * largest if signed else value < 0.5 * largest
        text = f"{value:z.{digits}f}" if np.isfinite(value) else "–"
        axes.text(
            column, row, text, ha="center", va="center", fontsize=TEXT_SIZE - 2, color="white" if dark else "black"
        )


def save_png_bytes(drawn: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=RESOLUTION, metadata={"Software": None})
    with Image.open(buffer) as image:
        few = image.convert("RGB").quantize(SHADES, dither=Image.Dither.NONE)
    few.save(buffer := io.BytesIO(), format="png", optimize=True)
    return buffer.getvalue()


def alt_text(drawn: Figure) -> str:
    """What a figure shows, in words, from its titles, axis labels and series."""
    parts = []
    for axes in drawn.axes:
        name = axes.get_title() or axes.get_title("left")
        labels = " against ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
        names = [text for text in axes.get_legend_handles_labels()[1] if text]
        pieces = [name, labels, f"series: {', '.join(names)}" if names else ""]
        parts.append("; ".join(filter(None, pieces)))
    return ". ".join(filter(None, parts)) or "figure"
