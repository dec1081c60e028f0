"""The exercises: which functions a student writes, and the files to write them in.

The tests are the only source: `@pytest.mark.exercise("chapters.quantization.gptq.gptq", points=3)` on a test, a class
or a module's `pytestmark` says that these tests grade that function. A student's file is the book's own file with that
function emptied, so it cannot drift from it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chapters.suggest import unknown
from minitfm.checkpoint import replace_file

ROOT = Path(__file__).resolve().parents[1]
STUB = ("# YOUR CODE HERE", "raise NotImplementedError")


@dataclass(frozen=True)
class Exercise:
    """One function to write: its dotted name, what it is worth, and the test files that grade it."""

    function: str
    points: int
    tests: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The function's own name."""
        return self.function.rpartition(".")[2]

    @property
    def file(self) -> Path:
        """Where it stands, relative to the book and to a submission, such as chapters/quantization/gptq.py."""
        return Path(*self.function.split(".")[:-1]).with_suffix(".py")

    @property
    def techniques(self) -> set[str]:
        """The chapters whose tests grade it, such as {"quantization.gptq"}."""
        return {f"{path.parent.name}.{path.stem.removeprefix('test_')}" for path in self.tests}


def exercises(root: Path = ROOT, tests: Path | None = None) -> list[Exercise]:
    """All exercises that the test files under `tests` (default: the book's own) declare, in their order.

    Raises ValueError, with file and line, for a mark that is not written out, names no top-level function of the book
    at `root`, or gives other points than an earlier mark of the same function.
    """
    points: dict[str, int] = {}
    files: dict[str, list[Path]] = {}
    for path in sorted((tests or root / "tests").rglob("test_*.py")):
        for place, function, worth in _marks(path):
            if points.setdefault(function, worth) != worth:
                raise ValueError(f"{place}: {function} is worth {points[function]} points elsewhere, {worth} here")
            if function not in files:
                _require_function(root, function, place)
            if path not in files.setdefault(function, []):
                files[function].append(path)
    return [Exercise(function, points[function], tuple(paths)) for function, paths in files.items()]


def _marks(path: Path) -> Iterator[tuple[str, str, int]]:
    """(place, function, points) of every `pytest.mark.exercise(...)` in a test file, top to bottom."""
    calls = [node for node in ast.walk(_parse(path)) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: call.lineno):
        if not ast.unparse(call.func).endswith("mark.exercise"):
            continue
        place = f"{path}:{call.lineno}"
        try:
            (function,) = (ast.literal_eval(argument) for argument in call.args)
            keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        except ValueError:
            function, keywords = None, {}
        worth = keywords.get("points")
        if not isinstance(function, str) or set(keywords) != {"points"} or type(worth) is not int or worth < 1:
            raise ValueError(f'{place}: write the mark out as exercise("chapters.part.technique.function", points=N)')
        yield place, function, worth


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from None


def _require_function(root: Path, function: str, place: str) -> None:
    """Raise ValueError unless `function` is chapters.part.technique.function or kernels.…, and is there."""
    *module, name = function.split(".")
    path = root.joinpath(*module).with_suffix(".py")
    if len(module) != 3 or module[0] not in ("chapters", "kernels") or not path.is_file():
        raise ValueError(f"{place}: {function} names no function of a chapter or a kernel file")
    find_function(path.read_text(encoding="utf-8"), name, place)


def find_function(source: str, name: str, place: str) -> ast.FunctionDef:
    """The top-level function `name` of a source. Raises ValueError that starts with `place` if it is not there."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise ValueError(f"{place}: there is no top-level function {name}")


def first_line(node: ast.stmt) -> int:
    """Index of the line where a statement begins, its decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1


def last_line(node: ast.stmt) -> int:
    """Index of the line after a statement's last."""
    return node.end_lineno or node.lineno


def skeleton(path: Path, functions: Iterable[str]) -> str:
    """The source of `path` with the bodies of those top-level functions emptied; signature and docstring stay."""
    source = path.read_text(encoding="utf-8")
    lines = source.split("\n")
    nodes = [find_function(source, name, str(path)) for name in functions]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):
        start, end = _body(node, lines)
        lines[start:end] = [" " * 4 + line for line in STUB]
    return "\n".join(lines)


def _body(node: ast.FunctionDef, lines: list[str]) -> tuple[int, int]:
    """The lines of a function's body after its docstring, with the comments that lead into it and trail after it."""
    first = node.body[0]
    if lines[first.lineno - 1][: first.col_offset].strip():
        raise ValueError(f"{node.name} must not stand on one line")
    if ast.get_docstring(node) is not None:
        start = last_line(first)
    else:
        start = first_line(first)
        while not lines[start - 1].strip() or lines[start - 1].lstrip().startswith("#"):
            start -= 1
    end = last_line(node)
    for index in range(end, len(lines)):
        if lines[index].strip() and not lines[index].startswith((" ", "\t")):
            break  # the next statement or comment of the module
        end = index + 1 if lines[index].strip() else end
    return start, end


def source_of(source: str, name: str) -> str:
    """The text of the top-level function `name`, decorators included."""
    node = find_function(source, name, "the book's file")
    return "\n".join(source.split("\n")[first_line(node) : last_line(node)])


def splice(source: str, name: str, replacement: str) -> str:
    """`source` with its top-level function `name`, decorators included, replaced by other text."""
    node = find_function(source, name, "the book's file")
    lines = source.split("\n")
    lines[first_line(node) : last_line(node)] = replacement.strip("\n").split("\n")
    return "\n".join(lines)


def runnable(exercise: Exercise) -> bool:
    """Whether this machine can run the tests of the exercise: those of a kernel need Triton."""
    return exercise.file.parts[0] == "chapters" or importlib.util.find_spec("triton") is not None


def choose(found: list[Exercise], names: Iterable[str]) -> list[Exercise]:
    """The exercises of the chapters called "gptq" or "quantization.gptq", all without names.

    Raises ValueError that suggests the nearest chapter.
    """
    known = sorted({technique for exercise in found for technique in exercise.techniques})
    wanted = set()
    for name in names:
        matches = {technique for technique in known if name in (technique, technique.partition(".")[2])}
        if not matches:
            raise unknown("chapter with exercises", name, known if "." in name else [t.split(".")[1] for t in known])
        wanted |= matches
    return [exercise for exercise in found if not names or exercise.techniques & wanted]


def write_exercises(
    chosen: list[Exercise], to: Path, force: bool = False, root: Path = ROOT
) -> dict[Path, list[Exercise]]:
    """Write the book's files with the chosen functions emptied into the folder `to`; all of them or none.

    Returns which exercises stand in which file. Raises ValueError if a file is there already and not `force`.
    """
    files: dict[Path, list[Exercise]] = {}
    for exercise in chosen:
        files.setdefault(to / exercise.file, []).append(exercise)
    if to.resolve() == root.resolve():
        raise ValueError(f"{to} is the book itself: give --to a folder of your own")
    for path in files:
        if path.exists() and not force:
            raise ValueError(f"{path} is there already, perhaps with your work in it: --force replaces it")
    texts = {
        path: skeleton(root / inside[0].file, [exercise.name for exercise in inside]) for path, inside in files.items()
    }
    for path, text in texts.items():
        with replace_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return files


def run_exercise(args: argparse.Namespace) -> int:
    """`exercise NAME --to DIR`: write the files, say what to do in them and how to verify it."""
    chosen = choose(exercises(ROOT), [args.name])
    if args.only:
        names = [exercise.name for exercise in chosen]
        chosen = [exercise for exercise in chosen if args.only in (exercise.name, exercise.function)]
        if not chosen:
            raise unknown(f"exercise of {args.name}", args.only, names)
    for path, inside in write_exercises(chosen, args.to, args.force, ROOT).items():
        tasks = (f"{exercise.name} ({exercise.points} point{'s' * (exercise.points > 1)})" for exercise in inside)
        print(f"{path}: write {', '.join(tasks)}")
    tests = sorted({os.path.relpath(path) for exercise in chosen for path in exercise.tests})
    verify = f"python -m pytest --submission={args.to} {' '.join(tests)}"
    print(
        f"\nVerify your work with:\n    {verify}\nor one function at a time:\n    {verify} --exercise {chosen[0].name}"
    )
    return 0


def add_command(commands) -> None:
    """Add `exercise` to the subparsers of `python -m chapters`."""
    command = commands.add_parser("exercise", help="write a chapter's file with the exercise functions left to you")
    command.add_argument("name", metavar="NAME", help="the chapter, such as gptq or quantization.gptq")
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="your own folder, such as my")
    command.add_argument("--only", metavar="FUNCTION", help="leave only this function to you")
    command.add_argument("--force", action="store_true", help="replace files that are there already")
    command.set_defaults(run=run_exercise)
