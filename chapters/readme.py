"""The table of contents as the README shows it: `python -m chapters list --into README.md` renews it."""

from __future__ import annotations

from pathlib import Path

from chapters import claims, contents, mutants, workbook
from chapters.contents import PARTS, Entry
from chapters.mutants import Score
from minitfm.checkpoint import replace_file

START, END = "<!-- contents -->", "<!-- /contents -->"  # around the table


def table() -> str:
    """The contents as a markdown table: exercises as the tests mark them, mutants and claims as recorded."""
    lines = [
        "| technique | paper | reference | kernel | notebook | exercises, mutants found | claim, measured |",
        "|---|---|---|---|---|---|---|",
    ]
    exercises = workbook.exercises()
    for key, title in PARTS.items():
        entries = [entry for entry in contents.CONTENTS if entry.part == key]
        if entries:
            lines.append(f"| **{title}** | | | | | | |")
        for entry in entries:
            count = sum(entry.dotted in exercise.techniques for exercise in exercises)
            lines.append(row(entry, count, mutants.current(entry.dotted, exercises), claims.recorded(entry.name)))
    return "\n".join(lines)


def row(entry: Entry, exercises: int, score: Score | None, record: dict | None) -> str:
    """One line of `table`: a chapter, how many exercises its tests grade, how many mutants they find, its claim."""
    places = entry.places()
    links = [f"[{place}]({places[place]})" for place in ("reference", "kernel", "notebook")]
    claim = "not recorded yet"
    if record:
        claim = record["sentence"] if record["holds"] else f"*Not reproduced:* {record['sentence']}"
    tests = f"[{exercises}]({places['tests']})" + (f", {score.share:.0%} of {score.mutants}" if score else "")
    idea, paper = f"**{entry.title}**: {entry.line}", f"[{entry.paper}]({entry.url})"
    cells = [idea, paper, *links, tests, claim]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def insert_table(path: Path) -> None:
    """Put `table` between the two contents markers of a markdown file, whole or not at all."""
    before, _, after = parts_around_table(path.read_text(encoding="utf-8"))
    with replace_file(path) as temporary:
        temporary.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")


def parts_around_table(text: str) -> tuple[str, str, str]:
    """Text before, between and after the contents markers. Raises ValueError if they are not there."""
    before, start, rest = text.partition(START)
    between, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the file needs a line {START} and, after it, a line {END}")
    return before, between.strip(), after
