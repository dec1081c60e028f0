"""The leaderboard: bits per weight and perplexity of every compression, a point for each setting, on one model.

The same points are drawn twice, against their bits and against the bytes that a decoded token reads with them.

    python -m chapters leaderboard [NAME ...]

The settings are those that contents.toml lists for a chapter: options of `python -m chapters run NAME`. Measuring all
takes minutes, so the points are kept in leaderboard.json, and the tour draws what is kept there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from chapters import contents, runner
from chapters.claims import reason, require_writable, versions
from chapters.contents import Entry
from chapters.figures import COLOURS, TEXT_SIZE, figure
from chapters.lab import Lab
from chapters.report import image_of, shown
from chapters.token_bytes import Reads, block_weights, reads
from minitfm import checkpoint
from minitfm.checkpoint import replace_file
from minitfm.config import Config

KEPT = Path(__file__).with_name("leaderboard.json")
CEILING = 4.0  # times the plain model's perplexity: what is worse stands at the upper edge, with its number
NEIGHBOURS = 1.08  # marks at the upper edge that are nearer than this factor share one text
MARKERS = "osD^vPX<>ph*d"  # 13, for six colours: 78 techniques look different


@dataclass(frozen=True)
class Point:
    """One technique (its dotted name) in one setting: bits per weight of the block linears, and perplexity.

    layers: how many the model has left; None: as many as it had.
    """

    technique: str
    setting: str
    bits: float
    perplexity: float
    layers: int | None = None


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
    left = model.config.layers if model.config.layers != lab.config.layers else None
    return Point(entry.dotted, setting, float(measured["bits per weight"]), lab.perplexity(model), left)


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
    """Perplexity against bits per weight."""
    drawn, axes = scatter(board, [point.bits for point in board.points])
    axes.set_xticks(bits := [2, 3, 4, 5, 6, 8, 12, 16], [str(count) for count in bits])
    axes.set_xlabel("bits per weight of the block linears, scales and indices included")
    name_techniques(drawn, axes)
    return drawn


def picture_of_reads(board: Board, config: Config) -> Figure:
    """Perplexity against what a decoded token reads with the model's whole context before it."""
    drawn, axes = scatter(board, [megabytes(found) for found in point_reads(board, config)])
    for bits, style in {0: ":", 16: "-.", 32: "--"}.items():
        where = megabytes(reads(config, bits, config.context))
        label = f"plain weights, {bits} bits" if bits else "no bits for the weights"
        axes.axvline(where, color=COLOURS["muted"], linestyle=style, label=label, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"MB read per decoded token, {config.context} tokens in context (counted)")
    name_techniques(drawn, axes)
    return drawn


def scatter(board: Board, across: Sequence[float]) -> tuple[Figure, Axes]:
    """Perplexity against what `across` has for each point: a colour and a form for each technique."""
    drawn, axes = figure(6.4, 6.6)
    ceiling, placed = CEILING * board.base, list(zip(across, board.points, strict=True))
    looks = zip(cycle(MARKERS), cycle([colour for role, colour in COLOURS.items() if role != "reference"]))
    techniques = dict.fromkeys(point.technique for point in board.points)
    for technique, (marker, colour) in zip(techniques, looks, strict=False):
        mine = [(x, min(point.perplexity, ceiling)) for x, point in placed if point.technique == technique]
        look = {"marker": marker, "color": colour, "markeredgecolor": "white", "markeredgewidth": 0.6}
        look |= {"markersize": 12 if marker == "*" else 8, "linestyle": ""}
        axes.plot(*zip(*mine, strict=True), **look, label=contents.find(technique).title)
    name_what_is_above(axes, [(x, point.perplexity) for x, point in placed], ceiling)
    axes.axhline(board.base, color=COLOURS["reference"], linestyle="--", label="plain model", zorder=1)
    axes.set(xscale="log", yscale="log", ylabel="perplexity")
    ticks = [board.base * factor for factor in (1, 1.25, 1.5, 2, 3, 4)]
    axes.set_yticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    return drawn, axes


def name_techniques(drawn: Figure, axes: Axes) -> None:
    """A legend below the axes, where it does not make the figure wider than a phone can show."""
    spare = {"handlelength": 1.8, "handletextpad": 0.5, "columnspacing": 1, "frameon": False}
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=TEXT_SIZE - 2, **spare)


def name_what_is_above(axes: Axes, placed: Iterable[tuple[float, float]], ceiling: float) -> None:
    """Write the perplexity of (place, perplexity) beyond the upper edge below its mark, neighbours' in one text."""
    groups: list[list[tuple[float, float]]] = []
    for x, perplexity in sorted(pair for pair in placed if pair[1] > ceiling):
        if groups and x < NEIGHBOURS * groups[-1][0][0]:
            groups[-1].append((x, perplexity))
        else:
            groups.append([(x, perplexity)])
    for group in groups:
        found = sorted(perplexity for _, perplexity in group)
        text = shown(found[0]) if len(found) == 1 else f"{shown(found[0])} to {shown(found[-1])}"
        look = {"rotation": 90, "ha": "center", "va": "top", "fontsize": TEXT_SIZE - 2}
        axes.annotate(text, (group[0][0], ceiling), xytext=(0, -8), textcoords="offset points", **look)


def point_reads(board: Board, config: Config) -> list[Reads]:
    """What a decoded token reads with each point of the board, with the model's whole context before it."""
    return [reads(config, point.bits, config.context, point.layers) for point in board.points]


def megabytes(found: Reads) -> float:
    """All that is read, in MB."""
    return found.total / 1e6


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
    return {
        "image": image_of(picture(board)),
        "rows": rows(board),
        "base": shown(board.base),
        "date": board.date,
        "versions": board.versions,
        "reads": reads_section(board, checkpoint.base().model.config),
    }


def reads_section(board: Board, config: Config) -> dict[str, Any]:
    """What the template needs of the bytes that a token reads: the figure, the formula's sizes, the points."""
    plain = reads(config, 16, config.context)
    sizes = {"weights": block_weights(config), "rest": plain.rest, "cache": plain.cache}
    return {
        "image": image_of(picture_of_reads(board, config)),
        "rows": reads_rows(board, config),
        "config": config,
        "sizes": {name: f"{size:,}" for name, size in sizes.items()},
    }


def reads_rows(board: Board, config: Config) -> list[dict[str, str]]:
    """The points as text, those that read little first, in KB."""
    found = sorted(zip(point_reads(board, config), board.points, strict=True), key=lambda pair: pair[0].total)
    return [
        {
            "title": contents.find(point.technique).title,
            "setting": point.setting,
            **{part: f"{getattr(one, part) / 1e3:,.0f}" for part in ("weights", "rest", "cache", "total")},
            "perplexity": shown(point.perplexity),
        }
        for one, point in found
    ]


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
