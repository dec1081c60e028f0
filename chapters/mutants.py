"""Mutation testing: are the tests of an exercise so strong that hardly any small change of the solution gets past them?

    python -m chapters mutants routing          # one chapter; without a name: the whole book
    python -m chapters mutants --sample 8       # at most eight mutants of each function, drawn evenly

mutmut's operators change one thing of a reference function at a time: a number, a comparison, an operator, an argument.
Each mutant takes the function's place and is judged like a student's answer. One that passes is a survivor: a test is
missing, or the mutant computes the same. Those that do are named, with the reason, in tests/wrong/equivalent.toml.

What a function raises is graded by its type alone, so nothing inside a `raise` is changed, and no text, which would say
the same of what is raised. Kernels are not mutated: what a mistake there does is tried by planted ones. The scores are
kept in mutants.json and shown in the README.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chapters import contents
from chapters.workbook import ROOT, Exercise, choose, exercises, source_of, splice
from minitfm.checkpoint import replace_file

KEPT = Path(__file__).with_name("mutants.json")
EQUIVALENT = Path("tests", "wrong", "equivalent.toml")
PASSED = 0.95  # of the mutants that are not equivalent, the share that the tests must find
CAUGHT = ("failed", "crashed", "timed out", "error", "no report")


@dataclass(frozen=True)
class Mutant:
    """A changed function: what the changed lines were and are, without indentation, and its whole source."""

    function: str
    before: str
    after: str
    source: str


@dataclass
class Score:
    """What became of a chapter's mutants. survivors: "function: before -> after" of those nobody explains."""

    mutants: int = 0
    caught: int = 0
    equivalent: int = 0
    survivors: list[str] = field(default_factory=list)
    sample: int | None = None
    checksum: str = ""
    date: str = ""

    @property
    def share(self) -> float:
        """Caught ones among those that are not equivalent; 1 if there are none."""
        return self.caught / max(self.mutants - self.equivalent, 1) if self.mutants > self.equivalent else 1.0


def mutants(source: str, function: str) -> list[Mutant]:
    """All mutants of a function's source, in the order of its lines; those that read alike are one."""
    try:
        import libcst
        from mutmut.mutation.mutators import mutation_operators
    except ImportError:
        raise ValueError("mutants needs mutmut: python -m pip install -e .[dev]") from None
    module: Any = libcst.parse_module(source)
    found: dict[str, Mutant] = {}
    same = ast.dump(ast.parse(source))
    for node in changeable(module.body[0]):
        for kind, operator in mutation_operators:
            for changed in operator(node) if isinstance(node, kind) else ():
                text = module.deep_replace(node, changed).code
                if text not in found and _differs(text, same):
                    found[text] = Mutant(function, *_lines(source, text), text)
    return list(found.values())


def changeable(node: Any) -> Iterator[Any]:
    """The nodes of a function that mutants change: not its annotations, decorators, texts, or what it raises."""
    import libcst

    if isinstance(node, libcst.Raise | libcst.Annotation | libcst.Decorator | libcst.BaseString):
        return
    yield node
    for child in node.children:
        yield from changeable(child)


def _differs(text: str, same: str) -> bool:
    """Whether a mutant is Python, and not the tree `same` of its source; None is what NumPy calls float64, too."""
    try:
        return ast.dump(ast.parse(text.replace("astype(None)", "astype(np.float64)"))) != same
    except SyntaxError:
        return False


def _lines(source: str, text: str) -> tuple[str, str]:
    """The lines that differ, before and after."""
    delta = list(difflib.ndiff(source.splitlines(), text.splitlines()))
    return tuple(" ".join(line[2:].strip() for line in delta if line.startswith(sign)) for sign in "-+")  # type: ignore


def equivalents(root: Path = ROOT) -> dict[tuple[str, str], str]:
    """{(function, changed lines): why it computes the same}. ValueError for an entry without one of the three."""
    path = root / EQUIVALENT
    tables = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", []) if path.exists() else []
    for number, each in enumerate(tables, 1):
        if set(each) != {"function", "change", "because"} or not all(isinstance(text, str) for text in each.values()):
            raise ValueError(f"{path}: entry {number} must have function, change and because, got {', '.join(each)}")
    return {(each["function"], each["change"]): each["because"] for each in tables}


def measure(chosen: Sequence[Exercise], root: Path = ROOT, limit: float = 60, sample: int | None = None) -> Score:
    """Judge the mutants of these exercises; `sample` of each function at most, spread evenly over it."""
    from chapters.judging import judge_all  # which needs pytest, and the README's table does not

    jobs, kinds = [], []
    for exercise in chosen:
        book = (root / exercise.file).read_text(encoding="utf-8")
        found = mutants(source_of(book, exercise.name), exercise.function)
        for mutant in found if sample is None else spread(found, sample):
            kinds.append(mutant)
            jobs.append((exercise, splice(book, exercise.name, mutant.source).encode()))
    known, score = equivalents(root), Score(sample=sample, checksum=checksum(chosen, root))
    score.date = datetime.now(UTC).date().isoformat()
    for mutant, verdict in zip(kinds, judge_all(jobs, root, limit), strict=True):
        score.mutants += 1
        if verdict.outcome in CAUGHT:
            score.caught += 1
        elif (mutant.function, mutant.after) in known:
            score.equivalent += 1
        else:
            score.survivors.append(f"{mutant.function}: {mutant.before} -> {mutant.after}")
    return score


def spread(found: Sequence[Mutant], count: int) -> list[Mutant]:
    """At most `count` of them, at even distances."""
    return [found[index * len(found) // count] for index in range(count)] if len(found) > count else list(found)


def checksum(chosen: Sequence[Exercise], root: Path = ROOT) -> str:
    """Changes with the files of these exercises and of their tests: a score is of this text and no other."""
    files = sorted({root / exercise.file for exercise in chosen} | {path for each in chosen for path in each.tests})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def graded(technique: str, found: Sequence[Exercise]) -> list[Exercise]:
    """The exercises of one chapter whose functions are mutated: those of the reference."""
    return [each for each in found if technique in each.techniques and each.file.parts[0] == "chapters"]


def read() -> dict[str, Score]:
    """The kept scores by the chapters' dotted names."""
    if not KEPT.is_file():
        return {}
    return {name: Score(**score) for name, score in json.loads(KEPT.read_text(encoding="utf-8")).items()}


def current(technique: str, found: Sequence[Exercise], root: Path = ROOT) -> Score | None:
    """The kept score of a chapter, if its files and tests are still those that were measured."""
    score = read().get(technique)
    return score if score and score.checksum == checksum(graded(technique, found), root) else None


def write(scores: dict[str, Score]) -> None:
    """Keep scores beside those of other chapters, whole or not at all."""
    kept = {name: asdict(score) for name, score in sorted((read() | scores).items())}
    with replace_file(KEPT) as temporary:
        temporary.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> int:
    """`mutants [NAME...]`: measure, keep, print; 1 if a chapter is below PASSED."""
    if args.sample is not None and args.sample < 1:
        raise ValueError(f"--sample must be at least 1, got {args.sample}")
    found = exercises(ROOT)
    known = {technique for exercise in choose(found, args.names) for technique in exercise.techniques}
    chosen = [entry.dotted for entry in contents.CONTENTS if entry.dotted in known]
    scores = {}
    for technique in chosen:
        scores[technique] = measure(graded(technique, found), ROOT, args.limit, args.sample)
        write({technique: scores[technique]})
        print(*scores[technique].survivors, sep="\n", end="\n" * bool(scores[technique].survivors))
    Console().print(table(scores))
    return int(any(score.share < PASSED for score in scores.values()))


def table(scores: dict[str, Score]) -> Table:
    """One line for each chapter."""
    drawn = Table("chapter", "mutants", "found", "equivalent", "survivors", "score")
    for name, score in scores.items():
        counts = (score.mutants, score.caught, score.equivalent, len(score.survivors))
        drawn.add_row(name, *map(str, counts), f"{score.share:.1%}")
    return drawn
