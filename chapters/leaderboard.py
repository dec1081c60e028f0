"""The leaderboard: bits per weight and perplexity of every compression, a point for each setting, on one model.

    python -m chapters leaderboard [NAME ...]

The settings are those that contents.toml lists for a chapter: options of `python -m chapters run NAME`. Measuring all
takes minutes, so the points are kept in leaderboard.json, and the tour draws what is kept there.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from chapters import contents, runner
from chapters.claims import reason, require_writable, versions
from chapters.contents import Entry
from chapters.figures import COLOURS, TEXT_SIZE, alt_text, figure, legend, save_png_bytes
from chapters.lab import Lab
from chapters.report import shown
from minitfm.checkpoint import replace_file

KEPT = Path(__file__).with_name("leaderboard.json")
CEILING = 4.0  # times the plain model's perplexity: what is worse stands at the upper edge, with its number
MARKERS = "osD^vPX<>ph*d"  # 13, for six colours: 78 techniques look different


@dataclass(frozen=True)
class Point:
    """One technique (its dotted name) in one setting: bits per weight of the block linears, and perplexity."""

    technique: str
    setting: str
    bits: float
    perplexity: float


@dataclass(frozen=True)
class Board:
    """Points measured on one model, whose own perplexity is `base`; `date` and `versions` of the last measurement."""

    base: float
    points: tuple[Point, ...]
    date: str
    versions: dict[str, str]


def order() -> list[str]:
    """The book's techniques by their dotted names."""
    return [entry.dotted for entry in contents.CONTENTS]


def measure(entry: Entry, setting: str, lab: Lab) -> Point:
    """Compress a fresh copy of the lab's model with the options `setting`, calibrated on the text of seed 0."""
    chapter, parser = entry.module(), runner.chapter_parser(argparse.ArgumentParser, entry)
    model, args = lab.model(), parser.parse_args(setting.split())
    measured = runner.compress(chapter, model, lab, args)
    return Point(entry.dotted, setting, float(measured["bits per weight"]), lab.perplexity(model))


def read() -> Board | None:
    """What is kept of the listed techniques, or None if nothing is. Raises ValueError for a damaged file."""
    if not KEPT.is_file():
        return None
    try:
        kept = json.loads(KEPT.read_text(encoding="utf-8"))
        points = [Point(**point) for point in kept.pop("points")]
        listed = tuple(point for point in points if point.technique in order())
        return Board(points=listed, **kept) if listed else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{KEPT} is damaged ({reason(error)}); measure it again") from None


def merged(old: Board | None, base: float, points: Iterable[Point]) -> Board:
    """`points` in the place of the old ones of the same techniques, in the book's order.

    Old points of another model, whose plain perplexity differs, are left out.
    """
    new = list(points)
    fresh = {point.technique for point in new}
    if old and old.base == base:
        new += [point for point in old.points if point.technique not in fresh]
    ordered = tuple(sorted(new, key=lambda point: order().index(point.technique)))
    return Board(base, ordered, datetime.now(UTC).date().isoformat(), versions())


def write(board: Board) -> None:
    """Keep a board, whole or not at all."""
    with replace_file(KEPT) as temporary:
        temporary.write_text(json.dumps(asdict(board), indent=1) + "\n", encoding="utf-8")


def picture(board: Board) -> Figure:
    """Perplexity against bits per weight: a mark for each setting, a colour and a form for each technique."""
    fig, axes = figure(7.6, 4.8)
    ceiling = CEILING * board.base
    looks = zip(cycle(MARKERS), cycle([colour for role, colour in COLOURS.items() if role != "reference"]))
    techniques = dict.fromkeys(point.technique for point in board.points)
    for technique, (marker, colour) in zip(techniques, looks, strict=False):
        mine = [point for point in board.points if point.technique == technique]
        heights = [min(point.perplexity, ceiling) for point in mine]
        look = {"marker": marker, "color": colour, "markeredgecolor": "white", "markersize": 8, "linestyle": ""}
        axes.plot([point.bits for point in mine], heights, **look, label=contents.find(technique).title)
    name_what_is_above(axes, board.points, ceiling)
    axes.axhline(board.base, color=COLOURS["reference"], linestyle="--", label="plain model")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(bits := [2, 3, 4, 5, 6, 8, 12, 16], [str(count) for count in bits])
    ticks = [board.base * factor for factor in (1, 1.25, 1.5, 2, 3, 4)]
    axes.set_yticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="bits per weight of the block linears, scales and indices included", ylabel="perplexity")
    legend(axes, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=TEXT_SIZE - 2)
    return fig


def name_what_is_above(axes: Axes, points: Iterable[Point], ceiling: float) -> None:
    """Write the perplexity of points beyond the upper edge beside them."""
    for point in points:
        if point.perplexity > ceiling:
            axes.annotate(shown(point.perplexity), (point.bits, ceiling), xytext=(4, -12), textcoords="offset points")


def rows(board: Board) -> list[dict[str, str]]:
    """The points as text, those of few bits first: what a table shows."""
    return [
        {
            "title": contents.find(point.technique).title,
            "setting": point.setting,
            "bits": shown(point.bits),
            "perplexity": shown(point.perplexity),
        }
        for point in sorted(board.points, key=lambda point: (point.bits, point.perplexity))
    ]


def section() -> dict[str, Any] | None:
    """What the report's template needs of the kept board; None if none is kept."""
    board = read()
    if board is None:
        return None
    drawn = picture(board)
    return {
        "picture": base64.b64encode(save_png_bytes(drawn)).decode(),
        "alt": alt_text(drawn),
        "rows": rows(board),
        "base": shown(board.base),
        "date": board.date,
        "versions": board.versions,
    }


def chosen(names: Sequence[str]) -> list[Entry]:
    """The chapters `names`, or all, that have settings. Raises ValueError for one that has none."""
    entries = [contents.find(name) for name in names] or [entry for entry in contents.CONTENTS if entry.settings]
    for entry in entries:
        if not entry.settings:
            raise ValueError(f"{entry.name} has no settings in contents.toml, so no place on the leaderboard")
    return entries


def run(args: argparse.Namespace) -> int:
    """`python -m chapters leaderboard`: measure, keep, print."""
    entries, lab = chosen(args.names), runner.make_lab(args)
    require_writable(KEPT.parent)
    old = read()
    work = [(entry, setting) for entry in entries for setting in entry.settings]
    points = [measure(*item, lab) for item in track(work, "measuring", transient=True)]
    board = merged(old, lab.base_perplexity, points)
    write(board)
    drawn = Table("bits per weight", "perplexity", "technique", "setting", box=SIMPLE)
    for row in rows(board):
        drawn.add_row(row["bits"], row["perplexity"], row["title"], row["setting"])
    Console().print(drawn)
    print(f"plain model: perplexity {shown(board.base)}; kept in {KEPT}")
    return 0
