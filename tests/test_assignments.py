"""The course: what assignments.toml may say, and that a released folder is all that a student needs, and no more."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chapters import assignments, hints, release
from chapters.__main__ import main
from chapters.workbook import ROOT, exercises, find_function
from tests.books import tiny_book

COURSE = assignments.read()
ONE = """
[[assignment]]
title = "Means"
brief = "Take means."
minutes = 10
points = 4
after = []
exercises = ["chapters.demo.mean.mean", "chapters.demo.mean.spread"]
hidden = ["tests/demo/test_mean.py::TestSpread::test_of_a_range"]
"""


@pytest.fixture(scope="module", params=COURSE, ids=lambda assignment: f"assignment{assignment.number}")
def closed(request, tmp_path_factory):
    """(assignment, its closed folder)."""
    folder = tmp_path_factory.mktemp("released") / "folder"
    release.write(request.param, folder, closed=True)
    return request.param, folder


def test_the_course_goes_from_attention_to_a_project():
    assert len(COURSE) == 8
    assert COURSE[0].title == "Attention and the KV cache" and "project" in COURSE[-1].title
    functions = [exercise.function for each in COURSE for exercise in each.exercises]
    assert len(set(functions)) == len(functions), "no exercise is set twice"


def test_every_exercise_of_the_course_has_hints_of_its_own():
    for each in COURSE:
        for exercise in each.exercises:
            assert len(hints.read().get(exercise.function, [])) >= 2, exercise.function


def test_a_closed_folder_holds_no_answer(closed):
    assignment, folder = closed
    assert not (folder / "solutions").exists() and not (folder / "tests" / "wrong").exists()
    for exercise in assignment.exercises:
        found = find_function((folder / exercise.file).read_text(encoding="utf-8"), exercise.name, "")
        assert ast.unparse(found.body[-1]) == "raise NotImplementedError"
    for test in assignment.hidden:
        assert test.rpartition("::")[2] not in (folder / test.split("::")[0]).read_text(encoding="utf-8")


def test_every_exercise_of_a_closed_folder_has_a_test_left(closed):
    assignment, folder = closed
    marked = {exercise.function: exercise for exercise in exercises(folder)}
    for exercise in assignment.exercises:
        assert marked[exercise.function].points == exercise.points


def test_all_that_a_closed_folder_imports_is_in_it(closed):
    _, folder = closed
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in release.PACKAGES:
                place = folder.joinpath(*node.module.split("."))
                assert place.with_suffix(".py").exists() or place.is_dir(), f"{path}: {node.module}"


def test_notebooks_of_a_folder_have_no_outputs(closed):
    for path in closed[1].rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_what_the_folder_says_is_true(closed):
    assignment, folder = closed
    text = (folder / "README.md").read_text(encoding="utf-8")
    for place in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"tests/[\w/]+\.py", text):
        assert (folder / place).is_file(), place
    assert f"{assignment.points} points" in text and assignment.brief.strip() in text


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A program run as a student would, in the folder."""
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


def test_an_open_folder_is_red_and_with_its_solutions_green_and_gives_hints(tmp_path):
    release.write(COURSE[3], tmp_path / "mine")
    tests = ["-m", "pytest", "tests/quantization/test_gptq.py", "--exercise", "quantize"]
    before = run(tmp_path / "mine", *tests)
    assert before.returncode == 1 and "NotImplementedError" in before.stdout
    shutil.copytree(tmp_path / "mine" / "solutions", tmp_path / "mine", dirs_exist_ok=True)
    after = run(tmp_path / "mine", *tests)
    assert after.returncode == 0, after.stdout
    hint = run(tmp_path / "mine", "-m", "chapters.hints", "gptq.gptq", "--step", "2")
    assert hint.returncode == 0 and "hint 2 of" in hint.stdout, hint.stderr
    nothing = run(tmp_path / "mine", "-m", "chapters.hints", "flash_attention")
    assert nothing.returncode == 2 and len(nothing.stderr.splitlines()) == 1


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "instructions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        release.write(COURSE[0], tmp_path / "mine")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return tiny_book(tmp_path_factory.mktemp("book"))


def read(book, text):
    path = book / "assignments.toml"
    path.write_text(text, encoding="utf-8")
    return assignments.read(path, book)


def test_an_assignment_is_what_its_table_says(book):
    (one,) = read(book, ONE)
    assert (one.number, one.title, one.minutes, one.points) == (1, "Means", 10, 4)
    assert [exercise.name for exercise in one.exercises] == ["mean", "spread"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("minutes = 10\n", "", "must have the keys .*minutes"),
        ("minutes", "hours", "must have the keys .*see "),
        ("points = 4", "points = 5", "points must be 4"),
        ("mean.spread", "mean.median", r"no test marks chapters\.demo\.mean\.median"),
        ("after = []", "after = [1]", "can come after earlier ones only"),
        ("::test_of_a_range", "::test_nothing", "there is no test"),
        ("test_mean.py::Test", "test_other.py::Test", "is in no file that tests its exercises"),
        ("[[assignment]]", "[[assignment", r"assignments\.toml: "),
    ],
)
def test_what_a_table_may_not_say(book, old, new, complaint):
    with pytest.raises(ValueError, match=complaint):
        read(book, ONE.replace(old, new))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["99", "--to", "x"], "there are assignments 1 to 8, got 99"),
        (["1"], "say where to write"),
        (["--closed"], "say which assignment"),
        (["1", "--to", "."], "is there already"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, arguments, complaint):
    assert main(["assignment", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_the_command_lists_and_releases(capsys, tmp_path):
    assert main(["assignment"]) == 0
    assert "FlashAttention" in capsys.readouterr().out
    assert main(["assignment", "8", "--to", str(tmp_path / "mine"), "--closed"]) == 0
    assert (tmp_path / "mine" / "chapters" / "course" / "project.py").exists()
    assert ROOT.name not in (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
