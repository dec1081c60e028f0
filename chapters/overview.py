"""The book on one page: its parts and chapters, what came out of their claims, and links to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from chapters import claims, contents
from chapters.contents import PARTS, Entry
from chapters.figures import COLOURS, TEXT_SIZE, figure, legend

COLUMNS = 5  # chapters in a row of the map
LOOKS = {  # outcome of a recorded claim: colour of the box, and hatching that says the same in greyscale
    "reproduced": ("#dbe7f3", ""),
    "not reproduced": ("#f7e3d0", "///"),
    "not recorded": ("#eceff1", "..."),
}


def outcomes() -> dict[str, str]:
    """{dotted name: "reproduced", "not reproduced" or "not recorded"}, of all chapters in the book's order."""
    found = {}
    for entry in contents.CONTENTS:
        record = claims.recorded(entry.name)
        found[entry.dotted] = "not recorded" if record is None else "not " * (not record["holds"]) + "reproduced"
    return found


def rows(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """(title of the part, or "" where it goes on; at most COLUMNS chapters) for each row of the map."""
    found = []
    for part, title in PARTS.items():
        mine = [entry for entry in entries if entry.part == part]
        starts = range(0, len(mine), COLUMNS)
        found += [(title if start == 0 else "", mine[start : start + COLUMNS]) for start in starts]
    return found


def book_map(entries: Sequence[Entry], outcome: Mapping[str, str]) -> Figure:
    """Every chapter as a box in its part's rows, coloured by what came out of its claim."""
    lines = rows(entries)
    drawn, axes = figure(9, 0.5 + 0.5 * len(lines))
    for place, (title, mine) in enumerate(lines):
        axes.text(-0.05, -place, fill(title, 14), ha="right", va="center", fontsize=TEXT_SIZE - 1, weight="bold")
        for column, entry in enumerate(mine):
            colour, hatch = LOOKS[outcome[entry.dotted]]
            look: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": colour, "hatch": hatch}
            look |= {"edgecolor": COLOURS["muted"], "label": outcome[entry.dotted]}
            axes.add_patch(FancyBboxPatch((column + 0.03, -place - 0.38), 0.94, 0.76, mutation_aspect=2, **look))
            axes.text(column + 0.5, -place, fill(entry.title, 22), ha="center", va="center", fontsize=TEXT_SIZE - 3,
                      bbox={"facecolor": colour, "edgecolor": "none", "pad": 2})  # fmt: skip
    axes.set(xlim=(-0.7, COLUMNS), ylim=(0.6 - len(lines), 1), title="Chapters, and their claims at the full budget")
    axes.set_axis_off()
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    legend(axes, handles=list(handles.values()), labels=list(handles), loc="upper right", ncols=len(handles))
    return drawn


def table_of_contents(entries: Sequence[Entry], outcome: Mapping[str, str]) -> str:
    """Markdown: for each chapter its notebook, relative to notebooks/, its idea, and what came out of its claim."""
    lines = ["| chapter | idea | claim |", "|---|---|---|"]
    for entry in entries:
        link = f"[{entry.title}]({entry.part}/{entry.name}.ipynb)"
        lines.append(f"| {link} | {entry.line} | {outcome[entry.dotted]} |")
    return "\n".join(lines)
