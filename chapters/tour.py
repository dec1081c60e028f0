"""The tour: every chapter's claim run on the model, one after the other, with a report to look at.

    python -m chapters tour [--part P] [--only NAME ...] [--quick | --full] [--model PATH] [--out FOLDER]

A chapter that fails is reported and the rest goes on. The report is rewritten after each chapter, so that whatever
ends the tour, what was done is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from chapters import contents, leaderboard, long_context, report
from chapters.claims import Result, recorded, require_writable, run_claim
from chapters.contents import Entry
from chapters.lab import Lab

COLOURS = {"reproduced": "green", "not reproduced": "yellow", "not measured": "yellow", "failed": "red"}
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def choose(part: str | None = None, only: Sequence[str] = ()) -> tuple[Entry, ...]:
    """The chapters of `part` (None: all) that `only` names (empty: all), in the book's order.

    Raises ValueError for an unknown name, or if nothing is left.
    """
    entries = contents.CONTENTS if part is None else contents.part(part)
    named = [contents.find(name) for name in only]
    chosen = tuple(entry for entry in entries if not named or entry in named)
    if not chosen:
        raise ValueError(f"part {part!r} has none of the chapters {', '.join(only)}")
    return chosen


def tour(entries: Sequence[Entry], lab: Lab, folder: Path, console: Console) -> int:
    """Run the claims of `entries` and write the report to `folder`/index.html.

    Returns the exit code: 0, 1 if a chapter failed, 130 if interrupted. Before any work raises ValueError if the
    folder cannot be written or the record of a chapter is damaged.
    """
    require_writable(folder)
    page = folder / "index.html"
    for entry in entries:
        recorded(entry.name)
    board, contexts = leaderboard.section(), long_context.section()
    start = time.perf_counter()
    results: list[Result] = []

    def keep(interrupted: bool = False) -> None:
        seconds = time.perf_counter() - start
        report.write(page, report.sections(results, entries), lab, seconds, interrupted, board, contexts)

    try:
        run_all(entries, lab, console, results, keep)
    except KeyboardInterrupt:
        if not results:
            console.print("interrupted before the first claim was done: no report written")
            return INTERRUPTED
        keep(interrupted=len(results) < len(entries))
    console.print(table(results, lab))
    console.print(f"{report.headline(report.sections(results, entries))}. Report: {page}", soft_wrap=True)
    if len(results) < len(entries):
        return INTERRUPTED
    return int(any(result.verdict == "failed" for result in results))


def run_all(
    entries: Sequence[Entry], lab: Lab, console: Console, results: list[Result], keep: Callable[[], None]
) -> None:
    """Append each chapter's result and `keep` it; a bar shows which one runs, a line stays for each that is done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading and measuring the text", total=len(entries))
        lab.describe()
        for entry in entries:
            bar.update(task, description=entry.title)
            result = run_claim(entry, lab)
            results.append(result)
            keep()
            mark = f"[{COLOURS[result.verdict]}]{report.MARKS[result.verdict]}[/]"
            console.print(f"{mark} {entry.title}: {result.verdict}, {took(result, lab)}")
            bar.advance(task)


def took(result: Result, lab: Lab) -> str:
    """Seconds, and whether they were too many."""
    over = f" (over the budget of {lab.seconds:.0f} s)" if result.seconds > lab.seconds else ""
    return f"{result.seconds:.1f} s{over}"


def table(results: Sequence[Result], lab: Lab) -> Table:
    """Technique, claim, numbers, and outcome with seconds, of each chapter that has run."""
    drawn = Table("technique", "claim", "numbers", box=SIMPLE, show_lines=True, expand=True)
    drawn.columns[1].ratio, drawn.columns[2].ratio = 5, 4
    drawn.add_column("outcome", min_width=len("not reproduced"))
    for result in results:
        numbers = result.claim.numbers if result.claim else {}
        drawn.add_row(
            result.entry.title,
            Text(result.claim.sentence if result.claim else result.error or ""),
            Text("\n".join(f"{name}: {report.shown(value)}" for name, value in numbers.items())),
            f"[{COLOURS[result.verdict]}]{result.verdict}[/]\n{took(result, lab)}",
        )
    return drawn
