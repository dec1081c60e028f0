"""`python -m chapters grade`: points for a folder of submissions, by the instructor's own tests.

Only the files of exercises are taken from a submission, one at a time: what else lies there (tests, conftest.py,
pytest.ini, sitecustomize.py) is never seen by Python or pytest, and one broken file costs the others nothing. Nor does
one wrong function: each exercise is judged with the book's solutions for the others in its file.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chapters import assignments, feedback
from chapters.judging import Verdict, judge_all
from chapters.screening import FORBIDDEN, objection
from chapters.workbook import ROOT, Exercise, exercises, runnable, source_of, splice
from minitfm.checkpoint import replace_file

COLUMNS = ("submission", "exercise", "points", "of", "outcome", "seconds", "message")
LARGEST = 1_000_000  # bytes; a chapter has about ten thousand
NOT_GRADABLE = Verdict("not gradable", "kernels need Triton, which is not installed here", 0.0)


@dataclass(frozen=True)
class Grade:
    """One line of the result: how a submission did in one exercise."""

    submission: str
    exercise: Exercise
    verdict: Verdict

    @property
    def points(self) -> int | None:
        """All or nothing: every test of the exercise must have passed. None where this machine cannot tell."""
        if self.verdict == NOT_GRADABLE:
            return None
        return self.exercise.points if self.verdict.outcome == "passed" else 0

    def row(self) -> tuple:
        """In the order of COLUMNS."""
        exercise, verdict = self.exercise, self.verdict
        seconds = f"{verdict.seconds:.1f}"
        return (
            self.submission,
            exercise.function,
            self.points,
            exercise.points,
            verdict.outcome,
            seconds,
            verdict.message,
        )


def grade(
    folder: Path, tests: Path | None = None, root: Path = ROOT, limit: float = 120, only: Container[str] | None = None
) -> list[Grade]:
    """Grade every subfolder of `folder` in every exercise of the book's tests, or of those in `tests`.

    With `only` nothing but the exercises of these dotted names is graded; what else a folder holds is not looked at.
    Without Triton the exercises in kernel files are `NOT_GRADABLE`.
    Raises ValueError if there is nothing to grade, or if the book's own solution does not pass: then the tests, or
    this machine, cannot tell right from wrong.
    """
    submissions = submissions_in(folder)
    found = exercises(root, tests)
    chosen = [exercise for exercise in found if only is None or exercise.function in only]
    if not chosen:
        raise ValueError(f"{tests or root / 'tests'} marks no exercises" + (" of these" if found else ""))
    answers = {
        (name, exercise): read_answer(path, exercise, found, root) if runnable(exercise) else NOT_GRADABLE
        for name, path in submissions.items()
        for exercise in chosen
    }
    jobs = [(exercise, answer) for (_, exercise), answer in answers.items() if isinstance(answer, bytes)]
    require_solvable({exercise for exercise, _ in jobs}, root, limit)
    judged = iter(judge_all(jobs, root, limit))
    return [
        Grade(name, exercise, next(judged) if isinstance(answer, bytes) else answer)
        for (name, exercise), answer in answers.items()
    ]


def submissions_in(folder: Path) -> dict[str, Path]:
    """Name and path of every submission. Raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: it must hold one folder for each submission")
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] not in "._"}
    if not found:
        raise ValueError(f"{folder} holds no submissions: one folder for each is expected")
    if set(found) <= {"chapters", "kernels"}:
        raise ValueError(f"{folder} is itself a submission: give the folder that holds all of them")
    return found


def require_solvable(found: set[Exercise], root: Path, limit: float) -> None:
    """Raise ValueError unless the book's own solution passes each exercise."""
    chosen = sorted(found, key=lambda exercise: exercise.function)
    verdicts = judge_all([(exercise, (root / exercise.file).read_bytes()) for exercise in chosen], root, limit)
    for exercise, verdict in zip(chosen, verdicts, strict=True):
        if verdict.outcome != "passed":
            raise ValueError(
                f"the book's own {exercise.function} does not pass these tests ({verdict.outcome}: {verdict.message}); "
                "nobody was graded"
            )


def read_answer(submission: Path, exercise: Exercise, found: list[Exercise], root: Path) -> bytes | Verdict:
    """The submitted file, other exercises in it solved, or the verdict where there is nothing to run."""
    path = submission / exercise.file
    if not path.is_file():
        elsewhere = [other.relative_to(submission) for other in submission.rglob(path.name) if other.is_file()]
        hint = f"; there is {elsewhere[0]}" if elsewhere else ""
        return Verdict("missing", f"no {exercise.file}{hint}", 0.0)
    if not path.resolve().is_relative_to(submission.resolve()):
        return Verdict("refused", f"{exercise.file} links out of the submission", 0.0)
    if path.stat().st_size > LARGEST:
        return Verdict("refused", f"{exercise.file} is larger than {LARGEST} bytes", 0.0)
    try:
        answer = path.read_bytes()
    except OSError as error:
        return Verdict("missing", f"{exercise.file} cannot be read: {error.strerror}", 0.0)
    forbidden = FORBIDDEN + (("chapters",) if exercise.file.parts[0] == "kernels" else ())
    reason = objection(answer, (root / exercise.file).read_bytes(), forbidden)
    return Verdict("refused", reason, 0.0) if reason else with_others_solved(answer, exercise, found, root)


def with_others_solved(answer: bytes, exercise: Exercise, found: list[Exercise], root: Path) -> bytes:
    """The answer with the book's solution for each other exercise of its file, so that no mistake counts twice.

    A function that the answer lacks stays away, and what is not Python stays as it is: its tests will say so.
    """
    solution = (root / exercise.file).read_text(encoding="utf-8")
    for other in found:
        if other.file == exercise.file and other != exercise:
            with suppress(SyntaxError, ValueError):
                answer = splice(answer.decode(), other.name, source_of(solution, other.name)).encode()
    return answer


def write(grades: list[Grade], path: Path) -> None:
    """All lines as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(COLUMNS)
        lines.writerows(grade.row() for grade in grades)


def summary(grades: list[Grade]) -> Table:
    """One line per submission: its points, and the exercises without full marks."""
    drawn = Table()
    drawn.add_column("submission")
    drawn.add_column("points", justify="right")
    drawn.add_column("not passed")
    for name in dict.fromkeys(grade.submission for grade in grades):
        mine = [grade for grade in grades if grade.submission == name]
        missed = [f"{g.exercise.name} ({g.verdict.outcome})" for g in mine if g.verdict.outcome != "passed"]
        possible = sum(grade.exercise.points for grade in mine if grade.points is not None)
        total = f"{sum(grade.points or 0 for grade in mine)} of {possible}"
        drawn.add_row(escape(name), total, ", ".join(missed))
    return drawn


def run(args: argparse.Namespace) -> int:
    """`grade SUBMISSIONS --out FILE`: grade, write the files, print the summary and the final project's leaderboard."""
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder, not a file")
    with replace_file(args.out) as temporary:
        temporary.touch()  # an unwritable place shows now, not after an hour of grading
        assignment = assignments.find(args.assignment, ROOT) if args.assignment else None
        only = assignment and {exercise.function for exercise in assignment.exercises}
        grades = grade(args.submissions, args.tests, ROOT, args.limit, only)
        write(grades, temporary)
    Console().print(summary(grades))
    if ranked := feedback.ranking(grades):
        Console().print(feedback.leaderboard(ranked))
    if args.feedback:
        feedback.write(grades, args.feedback)
        print(f"feedback and JUnit files for each submission: {args.feedback}")
    left_out = {grade.exercise.function for grade in grades if grade.points is None}
    if left_out:
        print(f"{NOT_GRADABLE.message}: {len(left_out)} exercises in kernel files were not graded")
    print(f"written to {args.out}")
    return 0
