"""The tour's report: one HTML file that holds everything, figures included."""

from __future__ import annotations

import base64
import math
import os
import platform
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from chapters.claims import Result, recorded, versions
from chapters.contents import PARTS, Entry
from chapters.figures import RESOLUTION, alt_text, save_png_bytes
from chapters.lab import Lab
from minitfm.checkpoint import replace_file

MARKS = {"reproduced": "✓", "not reproduced": "✗", "not measured": "○", "failed": "!", "not run": "–"}
INCH = 100  # pixels of the page: all figures' text has one size
TRAINING = {"steps": "training steps", "seconds": "training seconds", "command": "trained by"}  # of training.json


def write(
    page: Path,
    chapters: Sequence[dict],
    lab: Lab,
    seconds: float,
    interrupted: bool = False,
    board: dict[str, Any] | None = None,
    contexts: dict[str, Any] | None = None,
) -> None:
    """Render the report of the `chapters` (see `sections`), the leaderboard and long contexts, and put it at `page`.

    It is put there whole or not at all.
    """
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("report.html")
    html = template.render(
        headline=headline(chapters),
        explanation=explanation(lab),
        parts=by_part(chapters),
        model=model_card(lab),
        environment=environment(lab, seconds),
        interrupted=interrupted,
        board=board,
        contexts=contexts,
    )
    with replace_file(page) as temporary:
        temporary.write_text(html, encoding="utf-8")


def sections(results: Sequence[Result], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One section per chapter: those that have run, in the order of `entries`, then those that wait."""
    return [section(result) for result in results] + [waiting(entry) for entry in entries[len(results) :]]


def by_part(chapters: Sequence[dict]) -> list[dict[str, Any]]:
    """The sections of each part of the book: its key and title, the outcome in one line, and whether any has run."""
    return [
        {
            "key": key,
            "title": PARTS[key],
            "headline": headline(mine),
            "ran": any(chapter["verdict"] != "not run" for chapter in mine),
            "chapters": mine,
        }
        for key, mine in ((key, list(group)) for key, group in groupby(chapters, lambda chapter: chapter["part"]))
    ]


def headline(chapters: Sequence[dict]) -> str:
    """The outcome in one line: "3 of 5 claims reproduced, 1 not reproduced, 1 failed"."""
    verdicts = [chapter["verdict"] for chapter in chapters]
    total = len(verdicts)
    text = f"{verdicts.count('reproduced')} of {total} claim{'s' if total != 1 else ''} reproduced"
    others = [f"{verdicts.count(kind)} {kind}" for kind in list(MARKS)[1:] if kind in verdicts]
    return ", ".join([text, *others])


def explanation(lab: Lab) -> str:
    """How to read the numbers."""
    budget = "full budget" if lab.full else "quick budget"
    return (
        "Each technique's best-known finding, measured on a small transformer "
        f"({budget}: {len(lab.seeds)} seed{'s' if len(lab.seeds) > 1 else ''}, "
        f"{lab.validation.numel():,} measured tokens). “Not reproduced” means that the effect does not show here, "
        "“not measured” that this text lacks what would have to be measured."
    )


def section(result: Result) -> dict[str, Any]:
    """What the template needs of one chapter that has run."""
    claim = result.claim
    record = recorded(result.entry.name)
    return waiting(result.entry) | {
        "verdict": result.verdict,
        "mark": MARKS[result.verdict],
        "seconds": f"{result.seconds:.1f}",
        "sentence": claim.sentence if claim else None,
        "setting": claim.setting if claim else None,
        "error": result.error,
        "traceback": result.traceback,
        "image": image(result.picture, alt_text(claim.figure)) if result.picture and claim and claim.figure else None,
        "numbers": beside(claim.numbers if claim else {}, record),
        "recorded": summary(record) if record else None,
    }


def waiting(entry: Entry) -> dict[str, Any]:
    """What the template needs of a chapter that has not run."""
    return {
        "name": entry.name,
        "title": entry.title,
        "part": entry.part,
        "line": entry.line,
        "paper": entry.paper,
        "url": entry.url,
        "reference": entry.places()["reference"],
        "verdict": "not run",
        "mark": MARKS["not run"],
        "seconds": None,
        "sentence": None,
        "error": None,
    }


def image(png: bytes, alt: str) -> dict[str, Any]:
    """What the template needs of a figure: the picture in the page itself, the text in its place, and its size."""
    width, height = struct.unpack(">II", png[16:24])  # of the header of a PNG
    sizes = {"width": round(width * INCH / RESOLUTION), "height": round(height * INCH / RESOLUTION)}
    return {"picture": base64.b64encode(png).decode(), "alt": alt, **sizes}


def image_of(drawn: Figure) -> dict[str, Any]:
    """`image` of a figure of the book, described by its titles, labels and series."""
    return image(save_png_bytes(drawn), alt_text(drawn))


def beside(live: dict[str, float], record: dict | None) -> list[dict[str, str]]:
    """Rows of the numbers' table: this run's and the recorded one's under the same names."""
    kept = record["numbers"] if record else {}
    names = [*live, *(name for name in kept if name not in live)]
    return [{"name": name, "live": shown(live.get(name)), "recorded": shown(kept.get(name))} for name in names]


def summary(record: dict) -> dict[str, Any]:
    """The recorded run in words."""
    verdict = "reproduced" if record["holds"] else "not reproduced"
    kept = {key: record[key] for key in ("sentence", "date", "versions")}
    return kept | {"verdict": verdict, "seeds": len(record["seeds"]), "seconds": f"{record['seconds']:.0f}"}


def shown(value: float | None) -> str:
    """A number for people: four digits that count, "–" where there is none."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "infinite" if value > 0 else "−infinite"
    if value == int(value) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def model_card(lab: Lab) -> dict[str, str]:
    """The model and the text as label -> value."""
    trained = {label: lab.info[key] for key, label in TRAINING.items() if key in lab.info}
    facts = lab.describe() | {"perplexity": lab.base_perplexity} | trained
    return {name: shown(value) if isinstance(value, int | float) else value for name, value in facts.items()}


def environment(lab: Lab, seconds: float) -> dict[str, str]:
    """Where and when this ran."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "duration": duration(seconds),
        "seeds": ", ".join(map(str, lab.seeds)),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": f"{os.cpu_count()}, {torch.get_num_threads()} used",
        **versions(),
    }


def duration(seconds: float) -> str:
    """Seconds for people: "59 s", "4 min 12 s", "1 h 2 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min {whole % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
