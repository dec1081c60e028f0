"""The course: assignments over the book's exercises, and the folders in which students work.

    python -m chapters assignment            # lists them
    python -m chapters assignment 4 --to released            # a folder with everything in it
    python -m chapters assignment 4 --to released --closed   # without hidden tests and solutions

assignments.toml names exercises; what they are worth, their files and tests come from the marks on the tests.
"""

from __future__ import annotations

import argparse
import ast
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from chapters.workbook import ROOT, Exercise, exercises

KEPT = Path(__file__).with_name("assignments.toml")


@dataclass(frozen=True)
class Assignment:
    """One assignment of the course, `number` counting from 1.

    brief      what it is about, for students
    minutes    what it takes somebody who has done those of `after`
    points     the sum of its exercises' points
    hidden     pytest ids of tests that grade but are not in a closed folder
    """

    number: int
    title: str
    brief: str
    minutes: int
    points: int
    after: tuple[int, ...]
    exercises: tuple[Exercise, ...]
    hidden: tuple[str, ...]


def read(path: Path = KEPT, root: Path = ROOT) -> tuple[Assignment, ...]:
    """The assignments of a file, about exercises of the book at `root`.

    Raises ValueError that names the assignment for a missing or unknown key, an exercise or a hidden test that the
    book does not have, points that are not the marks' sum, and one that should come after itself or a later one.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("assignment", [])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    known = {exercise.function: exercise for exercise in exercises(root)}
    return tuple(checked(number, table, known, root) for number, table in enumerate(tables, 1))


def checked(number: int, table: dict[str, Any], known: dict[str, Exercise], root: Path) -> Assignment:
    """One table of the file as an `Assignment`; errors as in `read`."""
    keys = {field.name for field in fields(Assignment)} - {"number"}
    if wrong := keys ^ set(table):
        raise ValueError(f"assignment {number} must have the keys {', '.join(sorted(keys))}; see {', '.join(wrong)}")
    if missing := [name for name in table["exercises"] if name not in known]:
        raise ValueError(f"assignment {number}: no test marks {missing[0]} as an exercise")
    chosen = tuple(known[name] for name in table["exercises"])
    if table["points"] != (total := sum(exercise.points for exercise in chosen)):
        raise ValueError(f"assignment {number}: points must be {total}, as its exercises are marked")
    if not all(1 <= earlier < number for earlier in table["after"]):
        raise ValueError(f"assignment {number} can come after earlier ones only, got {table['after']}")
    for test in table["hidden"]:
        if root / test.split("::")[0] not in {path for exercise in chosen for path in exercise.tests}:
            raise ValueError(f"assignment {number}: {test} is in no file that tests its exercises")
        find_test(root, test)
    own = {**table, "exercises": chosen, "after": tuple(table["after"]), "hidden": tuple(table["hidden"])}
    return Assignment(number, **own)


def find_test(root: Path, test: str) -> ast.FunctionDef:
    """The function that a pytest id such as "tests/part/test_name.py::Class::test" names. ValueError if none."""
    file, *names = test.split("::")
    body = ast.parse((root / file).read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        if not found:
            raise ValueError(f"there is no test {test}")
        body, last = found[0].body, found[0]
    if not isinstance(last, ast.FunctionDef):
        raise ValueError(f"{test} is a class: name its tests")
    return last


def find(number: int, root: Path = ROOT) -> Assignment:
    """The assignment of that number. Raises ValueError that says how many there are."""
    found = read(root=root)
    if not 1 <= number <= len(found):
        raise ValueError(f"there are assignments 1 to {len(found)}, got {number}")
    return found[number - 1]


def listing(found: tuple[Assignment, ...]) -> Table:
    """All assignments for a terminal."""
    drawn = Table("number", "title", "exercises", "points", "minutes", "after", box=SIMPLE)
    for each in found:
        after = ", ".join(map(str, each.after)) or "none"
        numbers = (len(each.exercises), each.points, each.minutes)
        drawn.add_row(str(each.number), each.title, *map(str, numbers), after)
    return drawn


def add_command(commands) -> None:
    """Add `assignment` to the subparsers of `python -m chapters`."""
    command = commands.add_parser("assignment", help="list the course's assignments, or release one as a folder")
    command.add_argument("number", type=int, nargs="?", metavar="N", help="which; without it they are listed")
    command.add_argument("--to", type=Path, metavar="DIR", help="the folder to write; it must not exist")
    command.add_argument("--closed", action="store_true", help="leave out hidden tests and solutions")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`assignment [N --to DIR]`."""
    if args.number is None:
        if args.to or args.closed:
            raise ValueError("say which assignment to release, such as assignment 1 --to DIR")
        Console().print(listing(read()))
        return 0
    assignment = find(args.number)
    if args.to is None:
        raise ValueError(f"say where to write assignment {args.number}: --to DIR")
    from chapters import release

    release.write(assignment, args.to, args.closed)
    print(f"{args.to}: {assignment.title}, {assignment.points} points; README.md there says what to do")
    return 0
