"""What grading leaves: feedback that says what to do, JUnit that other programs count alike, an honest leaderboard."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from chapters import feedback, grading
from chapters.__main__ import main
from chapters.grading import NOT_GRADABLE, Grade
from chapters.judging import Verdict
from chapters.workbook import Exercise
from tests.books import CHAPTER, tiny_book, write

OUTCOMES = {"passed": "", "failed": "failure", "crashed": "failure", "timed out": "failure", "no report": "error",
            "error": "error", "missing": "error", "refused": "error"}  # fmt: skip
MEASURED = """
import numpy as np
import pytest
from chapters.demo.mean import mean

@pytest.mark.exercise("chapters.demo.mean.mean", points=5)
def test_mean(record_property):
    record_property("perplexity", float(mean(np.arange(6.0).reshape(2, 3)).sum()))
    record_property("bits per parameter", 3.0)
"""


def graded(name: str, outcome: str, message: str = "", **measured: float) -> Grade:
    exercise = Exercise(f"chapters.part.technique.{outcome.replace(' ', '_')}", 2, (Path("tests/test_x.py"),))
    return Grade(name, exercise, Verdict(outcome, message, 1.0, measured))


def test_junit_counts_each_outcome_as_what_it_is():
    grades = [graded("ann", outcome, "why <&") for outcome in OUTCOMES]
    grades.append(Grade("ann", grades[0].exercise, NOT_GRADABLE))
    suite = ET.fromstring(feedback.junit("ann", grades))[0]
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 9, "failures": 3, "errors": 4, "skipped": 1}
    for case, kind in zip(suite, [*OUTCOMES.values(), "skipped"], strict=True):
        assert [child.tag for child in case] == ([kind] if kind else [])
        assert not kind or kind == "skipped" or case[0].attrib["message"].endswith("why <&")


def test_feedback_names_points_reasons_and_what_to_do():
    grades = [graded("ann", "passed", perplexity=4.0), graded("ann", "failed", "test_a: 1 is not 2")]
    said = feedback.text("ann", grades)
    assert said.startswith("# ann: 2 of 4 points")
    assert "test_a: 1 is not 2" in said and "hint chapters.part.technique.failed" in said
    assert "Measured: perplexity 4." in said and said.count("Hints:") == 1


def test_the_leaderboard_ranks_what_passed_and_ties_share_a_place():
    scores = {"ann": 4.0, "bob": 3.0, "cat": 4.0}
    grades = [graded(name, "passed", perplexity=score) for name, score in scores.items()]
    grades += [graded("eve", "failed", perplexity=1.0), graded("dan", "passed")]
    ranked = feedback.rows(feedback.ranking(grades))
    assert [(row[0], row[1]) for row in ranked] == [("1", "bob"), ("2", "ann"), ("2", "cat")]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return tiny_book(tmp_path_factory.mktemp("book"))


def test_grading_writes_a_file_for_each_and_what_the_tests_measured(book, tmp_path, monkeypatch, capsys):
    write(tmp_path / "hidden/test_mean.py", MEASURED)
    for name, text in {"ann": CHAPTER, "bob": CHAPTER.replace("total / ", "0.5 * total / "), "eve": "def"}.items():
        write(tmp_path / "all" / name / "chapters/demo/mean.py", text)
    monkeypatch.setattr(grading, "ROOT", book)
    out = ["--out", str(tmp_path / "grades.csv"), "--feedback", str(tmp_path / "feedback")]
    assert main(["grade", str(tmp_path / "all"), "--tests", str(tmp_path / "hidden"), *out]) == 0
    names = sorted(path.name for path in (tmp_path / "feedback").iterdir())
    assert names == ["ann.md", "ann.xml", "bob.md", "bob.xml", "eve.md", "eve.xml", "leaderboard.md"]
    assert ET.parse(tmp_path / "feedback" / "eve.xml").getroot()[0].attrib["errors"] == "1"
    lines = (tmp_path / "feedback" / "leaderboard.md").read_text(encoding="utf-8").splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["bob", "ann"]
    assert "bits per parameter" in capsys.readouterr().out


def test_an_assignment_grades_its_own_exercises_only(book, tmp_path):
    write(tmp_path / "all/ann/chapters/demo/mean.py", CHAPTER)
    found = grading.grade(tmp_path / "all", None, book, only={"chapters.demo.mean.spread"})
    assert [(grade.exercise.name, grade.points) for grade in found] == [("spread", 1)]
    with pytest.raises(ValueError, match="marks no exercises of these"):
        grading.grade(tmp_path / "all", None, book, only={"chapters.demo.mean.median"})
