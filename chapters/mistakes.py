"""Do the tests of an exercise notice? The solution must pass, the skeleton and every planted mistake must fail.

A planted mistake is tests/wrong/<part>/<technique>/<function>__<mistake>.py: a docstring that starts with the dotted
name of the function, then the wrong function alone. It takes the right one's place in the book's file.
"""

from __future__ import annotations

import argparse
import ast
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chapters.judging import Verdict, judge_all
from chapters.workbook import ROOT, Exercise, choose, exercises, find_function, runnable, skeleton, splice

FEWEST = 3


@dataclass
class Proof:
    """What was found out about one exercise: a verdict for each variant of its file, and what is wrong with it."""

    exercise: Exercise
    variants: dict[str, str]
    faults: list[str]
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def conclude(self, verdicts: dict[str, Verdict]) -> None:
        """Keep the verdicts and add a fault for each that is not as it must be."""
        self.verdicts = verdicts
        for variant, verdict in verdicts.items():
            if variant == "solution" and verdict.outcome != "passed":
                self.faults.append(f"the solution {verdict.outcome}: {verdict.message}")
            if variant != "solution" and not verdict.red:
                reason = f" ({verdict.message})" if verdict.message else ""
                self.faults.append(f"{variant} is not found wrong: {verdict.outcome}{reason}")


def prove(names: list[str], root: Path = ROOT, limit: float = 60) -> list[Proof]:
    """Run solution, skeleton and planted mistakes of every exercise of the named chapters, of all without names.

    Without Triton the exercises in kernel files are left out. Raises ValueError for a planted mistake that is not in
    the form above or belongs to no exercise.
    """
    found = exercises(root)
    wanted = choose(found, names)
    planted = planted_mistakes(found, wanted, root)
    chosen = [exercise for exercise in wanted if runnable(exercise)]
    proofs = [_variants(exercise, planted[exercise.function], root) for exercise in chosen]
    jobs = [(proof.exercise, source.encode()) for proof in proofs for source in proof.variants.values()]
    verdicts = iter(judge_all(jobs, root, limit))
    for proof in proofs:
        proof.conclude({variant: next(verdicts) for variant in proof.variants})
    return proofs


def planted_mistakes(found: list[Exercise], wanted: list[Exercise], root: Path = ROOT) -> dict[str, dict[str, str]]:
    """For every wanted exercise of those found its mistakes: {"gptq__wrong_axis": source of the wrong function}."""
    known = {exercise.function for exercise in found}
    planted: dict[str, dict[str, str]] = {exercise.function: {} for exercise in wanted}
    by_name = {exercise.function: exercise for exercise in wanted}
    for path in sorted((root / "tests" / "wrong").rglob("*.py")):
        function, wrong = _read_mistake(path)
        if function not in known:
            raise ValueError(f"{path}: {function} is not an exercise")
        if function in planted:
            _require_replaceable(path, wrong, by_name[function], root)
            planted[function][path.stem] = wrong
    return planted


def _read_mistake(path: Path) -> tuple[str, str]:
    """The dotted function that a planted mistake's docstring names, and the source below the docstring."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, str(path))
    function, colon, idea = (ast.get_docstring(tree) or "").partition(":")
    if not colon or not idea.strip() or len(tree.body) != 2 or not isinstance(tree.body[1], ast.FunctionDef):
        raise ValueError(f'{path}: must be """dotted.function: what is wrong.""" and one function, nothing else')
    if not path.stem.startswith(f"{function.rpartition('.')[2]}__"):
        raise ValueError(f"{path}: the name must start with {function.rpartition('.')[2]}__")
    return function, "\n".join(source.split("\n")[tree.body[0].end_lineno or 0 :])


def _require_replaceable(path: Path, wrong: str, exercise: Exercise, root: Path) -> None:
    """Raise ValueError unless the wrong function has the right one's name, arguments and decorators."""
    right = find_function((root / exercise.file).read_text(encoding="utf-8"), exercise.name, str(path))
    mistaken = find_function(wrong, exercise.name, str(path))
    if _header(right) != _header(mistaken):
        raise ValueError(f"{path}: must begin as the book's function, {_header(right)}; got {_header(mistaken)}")


def _header(node: ast.FunctionDef) -> str:
    decorators = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    return " ".join([*decorators, f"def {node.name}({ast.unparse(node.args)})"])


def _variants(exercise: Exercise, planted: dict[str, str], root: Path) -> Proof:
    """The file as it is, emptied, and with each mistake in turn."""
    path = root / exercise.file
    solution = path.read_text(encoding="utf-8")
    variants = {"solution": solution, "skeleton": skeleton(path, [exercise.name])}
    variants |= {mistake: splice(solution, exercise.name, wrong) for mistake, wrong in planted.items()}
    few = [f"{len(planted)} planted mistakes, at least {FEWEST} are needed"] if len(planted) < FEWEST else []
    return Proof(exercise, variants, few)


def table(proofs: list[Proof]) -> Table:
    """One line per exercise: what passed, how many mistakes were found, how long it took."""
    drawn = Table()
    for heading in ("exercise", "solution", "skeleton", "mistakes found", "seconds"):
        drawn.add_column(heading, overflow="fold")
    for proof in proofs:
        verdicts = dict(proof.verdicts)
        solution, emptied = verdicts.pop("solution"), verdicts.pop("skeleton")
        found = f"{sum(verdict.red for verdict in verdicts.values())} of {len(verdicts)}"
        seconds = sum(verdict.seconds for verdict in proof.verdicts.values())
        drawn.add_row(proof.exercise.function, solution.outcome, emptied.outcome, found, f"{seconds:.1f}")
    return drawn


def run(args: argparse.Namespace) -> int:
    """`mistakes [NAME...]`: the table, then every fault; 1 if there is any."""
    chosen = choose(exercises(ROOT), args.names)
    proofs = prove(args.names, ROOT, args.limit)
    Console().print(table(proofs))
    for proof in proofs:
        for fault in proof.faults:
            print(f"{proof.exercise.function}: {fault}")
    if len(proofs) < len(chosen):
        print(f"{len(chosen) - len(proofs)} exercises in kernel files were not tried: Triton is not installed")
    return int(any(proof.faults for proof in proofs))
