"""What grading leaves for people and for other programs: feedback, JUnit files, and the project's leaderboard."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from minitfm.checkpoint import replace_file

if TYPE_CHECKING:
    from chapters.grading import Grade

RANKED_BY = "perplexity"  # the measurement that the leaderboard is about; the lowest comes first
ADVICE = {
    "passed": "",
    "failed": "A test says what it found; run it yourself, and ask for hints if you do not see why.",
    "error": "The tests could not begin: does the file import, and has the function its name and arguments?",
    "crashed": "The process died. A kernel that loads past its inputs does that.",
    "timed out": "It did not end in time: is there a loop that never does, or one where an array would do?",
    "no report": "The process ended itself. Nothing in an answer may end the program.",
    "missing": "Nothing was handed in where the book has this file.",
    "refused": "An answer may not reach the tests or the book's own solution.",
    "not gradable": "",
}


def write(grades: list[Grade], folder: Path) -> None:
    """NAME.md and NAME.xml for each submission, and leaderboard.md if the project was among the exercises."""
    for name, mine in by_submission(grades).items():
        put(folder / f"{name}.md", text(name, mine))
        put(folder / f"{name}.xml", junit(name, mine))
    if ranked := ranking(grades):
        lines = ["| place | submission | perplexity | bits per parameter |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows(ranked)]
        put(folder / "leaderboard.md", "\n".join(lines) + "\n")


def put(path: Path, content: str) -> None:
    """Write a text file, whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def by_submission(grades: list[Grade]) -> dict[str, list[Grade]]:
    """The lines of each submission, in their order."""
    found: dict[str, list[Grade]] = {}
    for grade in grades:
        found.setdefault(grade.submission, []).append(grade)
    return found


def text(name: str, grades: list[Grade]) -> str:
    """Feedback for one student, in markdown."""
    possible = sum(grade.exercise.points for grade in grades if grade.points is not None)
    lines = [f"# {name}: {sum(grade.points or 0 for grade in grades)} of {possible} points", ""]
    for grade in grades:
        verdict, function = grade.verdict, grade.exercise.function
        lines += [f"## {function}: {grade.points or 0} of {grade.exercise.points}, {verdict.outcome}", ""]
        lines += ["    " + verdict.message, ""] if verdict.message else []
        lines += [ADVICE[verdict.outcome], ""] if ADVICE.get(verdict.outcome) else []
        lines += [f"Measured: {', '.join(f'{key} {value:g}' for key, value in verdict.measured.items())}.", ""] if (
            verdict.measured) else []  # fmt: skip
        if verdict.outcome == "failed":
            lines += [f"Hints: `python -m chapters hint {function}`", ""]
    return "\n".join(lines)


def junit(name: str, grades: list[Grade]) -> str:
    """One submission as a JUnit test suite, a test case for each exercise: what CI services and course systems read."""
    wrong = [grade for grade in grades if grade.verdict.outcome in ("failed", "crashed", "timed out")]
    skipped = [grade for grade in grades if grade.points is None]
    errors = len(grades) - len(wrong) - len(skipped) - sum(grade.verdict.outcome == "passed" for grade in grades)
    counts = {"tests": len(grades), "failures": len(wrong), "errors": errors, "skipped": len(skipped)}
    seconds = sum(grade.verdict.seconds for grade in grades)
    described = {"name": name, "time": f"{seconds:.1f}"} | {key: str(count) for key, count in counts.items()}
    suite = ET.Element("testsuite", described)
    for grade in grades:
        verdict, exercise = grade.verdict, grade.exercise
        module = exercise.function.rpartition(".")[0]
        case = ET.SubElement(suite, "testcase", classname=module, name=exercise.name, time=f"{verdict.seconds:.1f}")
        if verdict.outcome != "passed":
            kind = "skipped" if grade in skipped else "failure" if grade in wrong else "error"
            ET.SubElement(case, kind, message=f"{verdict.outcome}: {verdict.message}")
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def ranking(grades: list[Grade]) -> list[Grade]:
    """The passed ones of those whose tests measure a perplexity, the best first; equal ones by name."""
    ranked = [grade for grade in grades if grade.points and RANKED_BY in grade.verdict.measured]
    return sorted(ranked, key=lambda grade: (grade.verdict.measured[RANKED_BY], grade.submission))


def rows(ranked: list[Grade]) -> list[tuple[str, str, str, str]]:
    """Place, submission, perplexity and bits of the leaderboard; equal perplexities share a place."""
    scores = [grade.verdict.measured[RANKED_BY] for grade in ranked]
    return [
        (str(scores.index(score) + 1), grade.submission, f"{score:.2f}", f"{bits:.2f}")
        for grade, score in zip(ranked, scores, strict=True)
        for bits in [grade.verdict.measured.get("bits per parameter", float("nan"))]
    ]


def leaderboard(ranked: list[Grade]) -> Table:
    """The leaderboard for a terminal."""
    drawn = Table("place", "submission", "perplexity", "bits per parameter", box=SIMPLE)
    for row in rows(ranked):
        drawn.add_row(*map(escape, row))
    return drawn
