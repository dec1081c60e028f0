"""An assignment as a folder in which a student works alone: a small book with the functions to write emptied.

The folder holds the files that the assignment's tests need and nothing else of the book: found by following imports,
and the names that tests hand to `kernel`, `oracle` and `golden`. What earlier assignments asked for arrives solved.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chapters import hints
from chapters.assignments import Assignment, find_test
from chapters.workbook import ROOT, first_line, last_line, skeleton

PACKAGES = ("minitfm", "chapters", "kernels", "tests")
ALWAYS = ("conftest.py", "pyproject.toml", "constraints.txt", "LICENSE", "tests/conftest.py", "chapters/hints.py")
NAMED = re.compile(r'\b(kernel|oracle|golden)\(f?"([\w./{}-]+)"')  # in tests: a chapter, a kernel, arrays


def write(assignment: Assignment, to: Path, closed: bool = False, root: Path = ROOT) -> None:
    """Write the folder `to`, whole or not at all. Raises ValueError if it is there already."""
    if to.exists():
        raise ValueError(f"{to} is there already: give --to a new folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as scratch:
        folder = Path(scratch, "folder")
        for path in needed(assignment, root):
            copy(path, folder / path.relative_to(root))
        empty(assignment, folder, root, closed)
        if closed:
            for test in assignment.hidden:
                remove(test, folder)
        (folder / "README.md").write_text(instructions(assignment, root, closed), encoding="utf-8")
        (folder / "chapters" / "hints.toml").write_text(hints.excerpt(assignment.exercises), encoding="utf-8")
        folder.rename(to)


def needed(assignment: Assignment, root: Path) -> set[Path]:
    """The files of the book that the folder holds, as they are there."""
    tests = {path for exercise in assignment.exercises for path in exercise.tests}
    found, waiting = set(), [*tests, *(root / exercise.file for exercise in assignment.exercises)]
    waiting += [root / name for name in ALWAYS]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += uses(path, root) if path.suffix == ".py" else []
    notebooks = {root / "notebooks" / exercise.file.relative_to("chapters").with_suffix(".ipynb")
                 for exercise in assignment.exercises if exercise.file.parts[0] == "chapters"}  # fmt: skip
    data = [path for package in ("minitfm/base", "chapters") for path in (root / package).glob("*.*")]
    return found | {path for path in notebooks if path.exists()} | {path for path in data if path.suffix != ".py"}


def uses(path: Path, root: Path) -> Iterator[Path]:
    """The book's files that a source imports, anywhere in it, or a test asks for by name."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (file for alias in node.names for file in files_of(alias.name, root))
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (file for alias in node.names for file in files_of(f"{node.module}.{alias.name}", root))
    if path.is_relative_to(root / "tests"):
        for kind, name in NAMED.findall(text):
            if kind == "golden":
                yield from (root / "tests" / "golden").glob(re.sub(r"{.*?}", "*", name) + ".npz")
            else:
                yield from files_of(f"{'kernels' if kind == 'kernel' else 'chapters'}.{name}", root)


def files_of(dotted: str, root: Path) -> Iterator[Path]:
    """The file of the module that a dotted name is, or is in, with the __init__.py of each package above it."""
    parts = dotted.split(".")
    if parts[0] not in PACKAGES:
        return
    for length in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:length])
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                yield file


def copy(path: Path, to: Path) -> None:
    """Copy a file; a notebook without its outputs."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".ipynb":
        shutil.copy(path, to)
        return
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    to.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def empty(assignment: Assignment, folder: Path, root: Path, closed: bool) -> None:
    """Take the solutions out of the folder's files; open, they go to solutions/."""
    for file in {exercise.file for exercise in assignment.exercises}:
        names = [exercise.name for exercise in assignment.exercises if exercise.file == file]
        if not closed:
            copy(root / file, folder / "solutions" / file)
        (folder / file).write_text(skeleton(root / file, names), encoding="utf-8")


def remove(test: str, folder: Path) -> None:
    """Take one test out of the folder's file."""
    node, path = find_test(folder, test), folder / test.split("::")[0]
    lines = path.read_text(encoding="utf-8").split("\n")
    del lines[first_line(node) : last_line(node)]
    path.write_text("\n".join(lines), encoding="utf-8")


def instructions(assignment: Assignment, root: Path, closed: bool) -> str:
    """README.md of the folder."""
    tests = sorted({path.relative_to(root).as_posix() for each in assignment.exercises for path in each.tests})
    rows = [f"| `{each.name}` | [{each.file.as_posix()}]({each.file.as_posix()}) | {each.points} |"
            for each in assignment.exercises]  # fmt: skip
    last = assignment.exercises[0]
    rest = "Your work is graded by these tests and some that are not here." if closed else (
        "The book's own functions are in solutions/: read them when you have tried.")  # fmt: skip
    return "\n".join([
        f"# Assignment {assignment.number}: {assignment.title}", "", assignment.brief.strip(), "",
        f"{assignment.points} points, about {assignment.minutes} minutes.", "",
        "| function to write | in | points |", "|---|---|---|", *rows, "",
        "The docstrings say what to write; everything else in the files works. Set up once:", "",
        "```sh", "python -m venv .venv && . .venv/bin/activate", 'python -m pip install -c constraints.txt -e ".[dev]"',
        "```", "", "Verify all of it, or one function:", "",
        "```sh", f"python -m pytest {' '.join(tests)}", f"python -m pytest {' '.join(tests)} --exercise {last.name}",
        "```", "", "When you are stuck, there are hints, one step at a time:", "",
        "```sh", f"python -m chapters.hints {last.function}", "```", "",
        f"A kernel is compared with your own reference: write that first. {rest} Hand in this folder.", "",
    ])  # fmt: skip
