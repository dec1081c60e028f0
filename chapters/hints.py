"""Hints for an exercise, one step at a time: `python -m chapters hint gptq.gptq`, then `--step 2`, ..

The first steps stand in hints.toml, from a question that points the way to what is nearly the answer. The last step is
the same for all exercises: what others got wrong, as the planted mistakes in tests/wrong say it.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from chapters.suggest import unknown

if TYPE_CHECKING:
    from chapters.workbook import Exercise

KEPT = Path(__file__).with_name("hints.toml")
WRONG = Path(__file__).resolve().parents[1] / "tests" / "wrong"


def read(path: Path = KEPT) -> dict[str, list[str]]:
    """The steps of each exercise, by its dotted name. Raises ValueError for what is no TOML or no list of texts."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for function, steps in found.items():
        if not (isinstance(steps, list) and steps and all(isinstance(step, str) and step.strip() for step in steps)):
            raise ValueError(f"{path}: {function} must be a list of texts")
    return found


def mistakes(function: str, folder: Path = WRONG) -> list[str]:
    """What the planted mistakes of an exercise say is wrong with them."""
    _, part, technique, name = function.split(".")
    said = [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            for path in sorted((folder / part / technique).glob(f"{name}__*.py"))]  # fmt: skip
    return [" ".join(text.removeprefix(f"{function}: ").split()) for text in said if text.startswith(f"{function}:")]


def steps(function: str) -> list[str]:
    """All hints of an exercise, the last of them the mistakes of others."""
    found = list(read().get(function, []))
    if others := mistakes(function):
        found.append("Others went wrong like this; does yours?\n" + "\n".join(f"  - {each}" for each in others))
    return found


def excerpt(chosen: Iterable[Exercise]) -> str:
    """A hints.toml for these exercises alone, mistakes included: for a folder that has no tests/wrong."""
    return "".join(f"{json.dumps(each.function)} = {json.dumps(steps(each.function))}\n" for each in chosen)


def find(name: str, known: Iterable[str]) -> str:
    """The exercise that "gptq", "gptq.gptq", "quantization.gptq.gptq" or all of the dotted name means.

    Raises ValueError with the nearest name if none does, and with those that could be meant if several do.
    """
    known = list(known)
    fitting = [function for function in known if f".{function}".endswith(f".{name}")]
    if len(fitting) > 1:
        raise ValueError(f"{name} could be {' or '.join(fitting)}")
    if not fitting:
        raise unknown("exercise", name, [*known, *(function.split(".", 2)[2] for function in known)])
    return fitting[0]


def show(function: str, step: int) -> None:
    """Print one step. Raises ValueError if there are not so many."""
    found = steps(function)
    if not 1 <= step <= len(found):
        raise ValueError(f"{function} has {len(found)} hints, got --step {step}")
    print(f"{function}, hint {step} of {len(found)}:\n{found[step - 1].strip()}")
    if step < len(found):
        print(f"(the next one: --step {step + 1})")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `hint`."""
    command.add_argument("name", metavar="EXERCISE", help="such as gptq.gptq")
    command.add_argument("--step", type=int, default=1, metavar="K", help="which hint; the first says the least")


def add_command(commands) -> None:
    """Add `hint` to the subparsers of `python -m chapters`."""
    command = commands.add_parser("hint", help="a hint for an exercise, one step at a time")
    add_arguments(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`python -m chapters hint`: for every exercise of the book."""
    from chapters.workbook import exercises

    show(find(args.name, [exercise.function for exercise in exercises()]), args.step)
    return 0


def main() -> int:
    """`python -m chapters.hints`: in a folder that was released, which has hints of its own and not all of the book."""
    command = argparse.ArgumentParser(prog="python -m chapters.hints")
    add_arguments(command)
    args = command.parse_args()
    try:
        show(find(args.name, read()), args.step)
    except ValueError as error:
        print(f"python -m chapters.hints: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
