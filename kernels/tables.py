"""Tables for a terminal, and as markdown for a file or a pipe; files replaced whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Table:
    """Lines of cells under a title; `failed` holds the numbers of lines to be shown in red."""

    title: str
    columns: Sequence[str]
    lines: list[list[str]] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)


def markdown(tables: list[Table]) -> str:
    """The tables under third-level headings; a line break after each."""
    lines = []
    for table in tables:
        lines += [f"### {table.title}", "", f"| {' | '.join(table.columns)} |", "|---" * len(table.columns) + "|"]
        lines += [f"| {' | '.join(line)} |" for line in table.lines] + [""]
    return "\n".join(lines)


def show(tables: list[Table]) -> None:
    """Print the tables: coloured on a terminal, as markdown elsewhere."""
    if not sys.stdout.isatty():
        print(markdown(tables))
        return
    import rich.table
    from rich.console import Console

    console = Console()
    for table in tables:
        drawn = rich.table.Table(*table.columns, title=table.title, title_justify="left")
        for number, line in enumerate(table.lines):
            drawn.add_row(*line, style="red" if number in table.failed else None)
        console.print(drawn)


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and rename it, so that no reader ever sees half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
