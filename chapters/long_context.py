"""Long contexts: what each attention chapter makes of a decode step of the base model, and what it costs.

    python -m chapters long-context

Four panels: bytes of keys and values that a step reads, bytes that the cache holds, time of a step, perplexity. Lengths
go beyond the texts that the model was trained on: bytes and time hardly depend on what it predicts there, and how well
it does is not asked. Perplexity is measured at its own length. Bytes are counted, those held on the cache objects
themselves, with keys and values in 16 bits, as a GPU would hold them; time, on this CPU and in float32, and perplexity
are measured. The numbers are kept in long_context.json, and the tour draws what is kept there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from chapters import contents, runner
from chapters.claims import reason, require_writable, versions
from chapters.figures import COLOURS, TEXT_SIZE, BookFigure, series, style
from chapters.lab import Lab
from chapters.leaderboard import MARKERS
from chapters.report import image_of, shown
from chapters.shared.decode_methods import LONGEST, METHODS, Method
from chapters.shared.feature_attention import StateCache
from chapters.shared.quantized_cache import QuantizedCache
from minitfm import data
from minitfm.cache import Cache
from minitfm.checkpoint import replace_file
from minitfm.evaluate import cached_perplexity
from minitfm.model import Transformer

KEPT = Path(__file__).with_name("long_context.json")
LENGTHS = [128, 256, 512, 1024, 2048, LONGEST]
TIMED = 7  # tokens at each length, after one to warm up
TEXTS, STEP = 16, 32  # measuring texts, and how many tokens of them a pass reads


@dataclass(frozen=True)
class Row:
    """What was found of a method: by length bytes read, bytes held and milliseconds, empty where it cannot decode."""

    name: str
    chapter: str
    trained: str
    cannot: str
    read: list[int]
    held: list[int]
    ms: list[float]
    perplexity: float


@dataclass(frozen=True)
class Record:
    """Rows, the plain model first. own: tokens of the texts that perplexity is measured on, the model's context."""

    lengths: list[int]
    own: int
    rows: list[Row]
    date: str
    versions: dict[str, str]


def held(cache: Any) -> int:
    """Bytes that a cache holds now: keys and values in 16 bits, codes and states as they are."""
    return cache.nbytes() if isinstance(cache, QuantizedCache | StateCache) else cache.nbytes() // 2


@torch.no_grad()
def decode(model: Transformer, cache: Cache, tokens: Tensor, length: int) -> float:
    """Read tokens `[T]` up to `length`, the last TIMED of them one by one: the median of their milliseconds.

    Processor time, which other programs change less than the clock's.
    """
    start, taken = len(cache), []
    first = max(start, length - TIMED - 1)
    if first > start:
        model(tokens[None, start:first], cache)
    for token in tokens[first:length]:
        before = time.process_time()
        model(token.view(1, 1), cache)
        taken.append(time.process_time() - before)
    return 1e3 * statistics.median(taken[1:] or taken)


def own_perplexity(method: Method, lab: Lab) -> float:
    """Perplexity of the second half of texts as long as the context, read through the cache, STEP tokens a pass."""
    texts = data.sequences(lab.streams[1], lab.config.context)
    texts = texts[:: max(1, len(texts) // TEXTS)][:TEXTS]
    model, cache = method.make(lab, len(texts), lab.config.context)
    return cached_perplexity(model, texts, cache, lab.config.context // 2, STEP)


def measure(method: Method, lab: Lab, lengths: Sequence[int] = tuple(LENGTHS)) -> Row:
    """All that is said of a method; `lengths` rise."""
    read, kept, ms = [], [], []
    if not method.cannot:
        model, cache = method.make(lab, 1, lengths[-1])
        for length in lengths:
            ms.append(decode(model, cache, lab.streams[1][: lengths[-1]], length))
            kept.append(held(cache))
            read.append(method.read(lab.config, length) if method.read else kept[-1])
    found = (method.name, method.chapter, method.trained, method.cannot, read, kept, ms)
    return Row(*found, own_perplexity(method, lab))


def read() -> Record | None:
    """What is kept of the listed chapters and the plain model; None without any. ValueError for a damaged file."""
    if not KEPT.is_file():
        return None
    try:
        kept = json.loads(KEPT.read_text(encoding="utf-8"))
        listed = {"", *(entry.name for entry in contents.CONTENTS)}
        rows = [row for row in (Row(**row) for row in kept.pop("rows")) if row.chapter in listed]
        return Record(rows=rows, **kept) if any(row.chapter for row in rows) else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{KEPT} is damaged ({reason(error)}); measure it again") from None


def write(record: Record) -> None:
    """Keep a record, whole or not at all."""
    with replace_file(KEPT) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def looks() -> list[dict[str, Any]]:
    """For each row of a record, how it is drawn: the plain model above all others, since some lie on its line."""
    colours = cycle([colour for role, colour in COLOURS.items() if role != "reference"])
    others = [{"marker": marker, "color": next(colours), "markersize": 6, "linewidth": 1.2} for marker in MARKERS]
    return [series("reference") | {"zorder": 4}, *others]


def picture(record: Record) -> Figure:
    """The four panels."""
    drawn = BookFigure(figsize=(8.6, 9), layout="constrained", facecolor="white")
    *lines, quality = [style(axes) for axes in drawn.subplots(2, 2).flat]
    names = ("read per token (counted)", "held by the cache (counted)", "time per token (measured)")
    units, scale = ("KB", "KB", "ms, one CPU core"), (1e-3, 1e-3, 1)
    for axes, title, unit in zip(lines, names, units, strict=True):
        axes.set(title=title, xlabel="tokens in context", ylabel=unit, xscale="log", yscale="log")
        axes.axvline(record.own, color=COLOURS["muted"], linestyle=":")
        axes.set_xticks(record.lengths, labels=map(str, record.lengths))
        axes.minorticks_off()
    for row, look in zip(record.rows, looks(), strict=False):
        for axes, values, factor in zip(lines, (row.read, row.held, row.ms), scale, strict=True):
            if values:
                axes.plot(record.lengths, [factor * value for value in values], **look, label=row.name)
    draw_quality(quality, record)
    handles, labels = lines[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=TEXT_SIZE - 1)
    return drawn


def draw_quality(axes: Axes, record: Record) -> None:
    """Perplexity of each method, as a multiple of the plain model's, with its name and how it was trained."""
    for place, (row, look) in enumerate(zip(record.rows, looks(), strict=False)):
        times = row.perplexity / record.rows[0].perplexity
        axes.plot([times], [-place], **(look | {"marker": look["marker"] or "|", "markersize": 9, "linestyle": ""}))
        right = times < 2.5
        how = {"ha": "left" if right else "right", "va": "center", "fontsize": TEXT_SIZE - 2.5}
        offset = (8 if right else -8, 0)
        text = f"{row.name}, {row.trained}"
        axes.annotate(text, (times, -place), xytext=offset, textcoords="offset points", **how)
    axes.set(title=f"perplexity at {record.own} tokens (measured)", xlabel="plain model = 1", xscale="log", yticks=[])
    axes.set_xticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
    axes.minorticks_off()


def rows(record: Record) -> list[dict[str, str]]:
    """What a table shows: every method at the longest context."""
    plain = record.rows[0].perplexity
    return [
        {
            "name": row.name,
            "trained": row.trained,
            "read": shown(row.read[-1] / 1e3) if row.read else "–",
            "held": shown(row.held[-1] / 1e3) if row.held else "–",
            "ms": shown(row.ms[-1]) if row.ms else "–",
            "perplexity": shown(row.perplexity / plain),
            "cannot": row.cannot,
        }
        for row in record.rows
    ]


def section() -> dict[str, Any] | None:
    """What the report's template needs of the kept record; None if none is kept."""
    record = read()
    if record is None:
        return None
    facts = {"own": record.own, "longest": record.lengths[-1], "date": record.date, "versions": record.versions}
    return facts | {"image": image_of(picture(record)), "rows": rows(record)}


def run(args: argparse.Namespace) -> int:
    """`python -m chapters long-context`: measure, keep, print."""
    lab = runner.make_lab(args)
    require_writable(KEPT.parent)
    found = [measure(method, lab) for method in track(METHODS, "measuring", transient=True)]
    write(record := Record(LENGTHS, lab.config.context, found, datetime.now(UTC).date().isoformat(), versions()))
    drawn = Table("method", "training", "KB read", "KB held", "ms", "perplexity, plain = 1", box=SIMPLE)
    for row in rows(record):
        drawn.add_row(*(row[key] for key in ("name", "trained", "read", "held", "ms", "perplexity")))
    Console().print(drawn)
    for row in (row for row in record.rows if row.cannot):
        print(f"{row.name} cannot decode step by step: {row.cannot}")
    print(f"the step that reads token {LONGEST}; perplexity at {record.own} tokens; kept in {KEPT}")
    return 0
