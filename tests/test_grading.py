"""`python -m chapters grade`: full marks for a right answer only, and a line in the table for every other one."""

import csv
import sys

import pytest

from chapters import grading
from chapters.__main__ import main
from chapters.workbook import exercises
from tests.books import CHAPTER, HAS_TRITON, KERNEL, tiny_book, write

MEAN, SPREAD, KERNEL_ID = "chapters.demo.mean.mean", "chapters.demo.mean.spread", "kernels.demo.mean.mean_kernel"
EXERCISES = (MEAN, SPREAD, KERNEL_ID)
LIMIT = 6  # seconds for one exercise, which needs one
FILE, KERNEL_FILE = "chapters/demo/mean.py", "kernels/demo/mean.py"


def doing(statement):
    """The chapter, with `mean` doing something else first."""
    return CHAPTER.replace("    total = ", f"    {statement}\n    total = ")


def wrong(prelude=""):
    """The chapter with a wrong `mean`, below something that tries to have it pass."""
    return prelude + CHAPTER.replace("x.sum(-1)", "x.sum(0)")


# name: (submitted files, {exercise: (outcome, words in the message)}); exercises not named are "missing"
RIGHT = {MEAN: ("passed", ""), SPREAD: ("passed", "")}
SUBMISSIONS = {
    "right": ({FILE: CHAPTER}, RIGHT),
    "right_after_a_print": ({FILE: doing("print('x' * 10**6)")}, RIGHT),
    "right_with_suspicious_names": ({FILE: doing("tests = gc = inspect = sys = pytest = x.shape")}, RIGHT),
    "partially_right": ({FILE: wrong()}, {**RIGHT, MEAN: ("failed", "test_mean: AssertionError")}),
    "ends_quietly": ({FILE: doing("import os; os._exit(0)")}, {**RIGHT, MEAN: ("no report", "ended with 0")}),
    "ends_at_once": ({FILE: f"raise SystemExit(0)\n{CHAPTER}"}, {MEAN: ("error", ""), SPREAD: ("error", "")}),
    "crashes": (
        {FILE: doing("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")},
        {**RIGHT, MEAN: ("crashed", "SIGSEGV")},
    ),
    "never_ends": ({FILE: doing("while True: pass")}, {**RIGHT, MEAN: ("timed out", f"no result after {LIMIT} s")}),
    "nothing": ({}, {}),
    "wrong_name": ({"chapters/demo/means.py": CHAPTER}, {MEAN: ("missing", "no chapters/demo/mean.py")}),
    "wrong_place": ({"my/mean.py": CHAPTER}, {MEAN: ("missing", "there is my/mean.py")}),
    "wrong_exercise": (
        {FILE: "def median(x):\n    return x\n"},
        {MEAN: ("error", "cannot import name 'mean'"), SPREAD: ("error", "cannot import name")},
    ),
    "missing_import": (
        {FILE: f"import nowhere\n{CHAPTER}"},
        {MEAN: ("error", "No module named 'nowhere'"), SPREAD: ("error", "nowhere")},
    ),
    "not_python": ({FILE: "def mean(x:\n"}, {MEAN: ("error", "SyntaxError"), SPREAD: ("error", "SyntaxError")}),
    "odd_message": (
        {FILE: doing("raise ValueError('\\ud800\\n=1,\"')")},
        {**RIGHT, MEAN: ("failed", 'ValueError: =1,"')},
    ),
    "own_settings": (
        {
            FILE: wrong(),
            "conftest.py": "def pytest_collection_modifyitems(items):\n    items[:] = []\n",
            "tests/conftest.py": "def pytest_runtest_makereport(): return None\n",
            "tests/demo/test_mean.py": "def test_mean(): pass\n",
            "pytest.ini": "[pytest]\naddopts = --collect-only\n",
            "sitecustomize.py": "import os; os._exit(0)\n",
            "numpy.py": "raise SystemExit\n",
        },
        {**RIGHT, MEAN: ("failed", "AssertionError")},
    ),
    "kernel": ({KERNEL_FILE: KERNEL}, {KERNEL_ID: ("passed", "")}),
    "wrong_kernel": ({KERNEL_FILE: KERNEL.replace(" / columns)", ")")}, {KERNEL_ID: ("failed", "test_kernel: Assert")}),
    "kernel_from_the_chapter": (
        {KERNEL_FILE: f"import chapters\n{KERNEL}"},
        {KERNEL_ID: ("refused", "line 1 uses chapters")},
    ),
}
UNTOUCHED = dict.fromkeys(EXERCISES, ("missing", "no "))
if not HAS_TRITON:
    SUBMISSIONS = {name: case for name, case in SUBMISSIONS.items() if KERNEL_FILE not in case[0]}
    UNTOUCHED[KERNEL_ID] = ("not gradable", "kernels need Triton")
CHEATS = {
    "asks_the_oracle": ("from tests.conftest import oracle\nmean = oracle('demo.mean').mean", "line 1 uses tests"),
    "skips": ("import pytest\npytest.skip('too hard', allow_module_level=True)", "line 1 uses pytest"),
    "patches_numpy": (
        "import numpy.testing\nnumpy.testing.assert_allclose = lambda *a, **k: None",
        "line 1 uses numpy.testing",
    ),
    "patches_numpy_in_passing": (
        "import numpy as np\nnp.testing.assert_allclose = lambda *a, **k: None",
        "line 2 uses numpy.testing",
    ),
    "reads_the_solution": ("open('{book}/chapters/demo/mean.py').read()", "reads the book's own solution"),
    "imports_the_solution": (
        "import sys\nimport chapters.demo as d\n"
        "here = d.__path__.pop(0)\ndel vars(sys)['modules']['chapters.demo.mean']\n"
        "import chapters.demo.mean\nd.__path__.insert(0, here)",
        "reads the book's own solution",
    ),
}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return tiny_book(tmp_path_factory.mktemp("book"))


@pytest.fixture(scope="module")
def rows(book, tmp_path_factory):
    """The lines of grades.csv for SUBMISSIONS, by submission and exercise."""
    folder = tmp_path_factory.mktemp("submissions")
    for name, (files, _) in SUBMISSIONS.items():
        (folder / name).mkdir()
        for file, text in files.items():
            write(folder / name / file, text)
    write(folder / ".git" / FILE, CHAPTER)
    write(folder / "readme.txt", "not a submission")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading, "ROOT", book)
        assert main(["grade", str(folder), "--out", str(book / "out/grades.csv"), "--limit", f"{LIMIT}"]) == 0
    with (book / "out/grades.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [path.name for path in (book / "out").iterdir()] == ["grades.csv"]
    return {(line["submission"], line["exercise"]): line for line in lines}


def test_every_submission_has_a_line_for_every_exercise(rows):
    assert sorted(rows) == sorted((name, exercise) for name in SUBMISSIONS for exercise in EXERCISES)


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_a_submission_gets_what_it_deserves(rows, name):
    expected = UNTOUCHED | SUBMISSIONS[name][1]
    for exercise, (outcome, words) in expected.items():
        row = rows[name, exercise]
        assert row["outcome"] == outcome and words in row["message"], row
        assert row["points"] == {"passed": row["of"], "not gradable": ""}.get(outcome, "0")


STRICT = """
import numpy as np
import pytest
from chapters.demo.mean import mean
from tests.conftest import oracle, tolerance

@pytest.mark.exercise("chapters.demo.mean.mean", points=5)
def test_mean():
    x = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(mean(x), oracle("demo.mean").mean(x), **tolerance(np.float64))
"""


@pytest.fixture(scope="module")
def cheats(book, tmp_path_factory):
    """Grades of CHEATS, by the instructor's own test of one function."""
    folder = tmp_path_factory.mktemp("cheats")
    write(folder / "tests/test_strict.py", STRICT)
    for name, (prelude, _) in CHEATS.items():
        own_mean = "\ndef mean" in prelude
        chapter = wrong().replace("def mean", "def other_mean" if own_mean else "def mean")
        write(folder / "all" / name / FILE, prelude.replace("{book}", str(book)) + "\n" + chapter)
    return {grade.submission: grade for grade in grading.grade(folder / "all", folder / "tests", book)}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_gets_nothing_and_is_told_why(cheats, name):
    grade = cheats[name]
    assert grade.points == 0 and grade.exercise.points == 5
    assert grade.verdict.outcome == "refused" and CHEATS[name][1] in grade.verdict.message


def test_the_instructor_s_own_tests_decide_and_may_use_the_oracle(book, tmp_path):
    write(tmp_path / "hidden/test_strict.py", STRICT)
    write(tmp_path / "all/ann" / FILE, CHAPTER)
    write(tmp_path / "all/bob" / FILE, wrong())
    grades = grading.grade(tmp_path / "all", tmp_path / "hidden", book)
    assert [(grade.submission, grade.points) for grade in grades] == [("ann", 5), ("bob", 0)]
    assert grades[1].verdict.outcome == "failed" and "Not equal to tolerance" in grades[1].verdict.message


def test_nobody_is_graded_by_tests_that_the_solution_does_not_pass(book, tmp_path):
    write(tmp_path / "hidden/test_strict.py", STRICT.replace("mean(x), oracle", "-mean(x), oracle"))
    write(tmp_path / "all/ann" / FILE, CHAPTER)
    with pytest.raises(ValueError, match=r"own chapters\.demo\.mean\.mean does not pass these .*nobody was graded"):
        grading.grade(tmp_path / "all", tmp_path / "hidden", book)


@pytest.mark.parametrize(
    ("made", "arguments", "complaint"),
    [
        ([], ["nowhere"], "no folder nowhere"),
        (["all"], ["all"], "all holds no submissions"),
        (["all/chapters"], ["all"], "is itself a submission"),
        (["all/ann", "out"], ["all", "--out", "out"], "--out out is a folder"),
        (["all/ann", "none"], ["all", "--tests", "none"], "none marks no exercises"),
    ],
)
def test_what_cannot_be_graded_is_one_line_and_no_file(tmp_path, monkeypatch, capsys, made, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    for folder in made:
        (tmp_path / folder).mkdir(parents=True)
    assert main(["grade", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows gives links to administrators only")
def test_links_to_the_solution_huge_and_locked_files_are_not_run(book, tmp_path):
    mean = exercises(book)[0]
    (tmp_path / "linked/chapters/demo").mkdir(parents=True)
    (tmp_path / "linked" / FILE).symlink_to(book / FILE)
    write(tmp_path / "huge" / FILE, CHAPTER + "#" * grading.LARGEST)
    (tmp_path / "folder" / FILE).mkdir(parents=True)
    found = {name: grading.read_answer(tmp_path / name, mean, [mean], book) for name in ("linked", "huge", "folder")}
    assert found["linked"].message == "chapters/demo/mean.py links out of the submission"
    assert found["huge"].message == "chapters/demo/mean.py is larger than 1000000 bytes"
    assert (found["folder"].outcome, found["folder"].message) == ("missing", "no chapters/demo/mean.py")


def test_without_triton_kernels_are_reported_and_count_for_nothing(book, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grading, "runnable", lambda exercise: exercise.file.parts[0] == "chapters")
    monkeypatch.setattr(grading, "ROOT", book)
    write(tmp_path / "all/ann" / FILE, CHAPTER)
    write(tmp_path / "all/ann" / KERNEL_FILE, KERNEL)
    assert main(["grade", str(tmp_path / "all"), "--out", str(tmp_path / "grades.csv")]) == 0
    shown = capsys.readouterr().out
    assert "4 of 4" in shown and "not installed here: 1 exercises in kernel files were not graded" in shown
    with (tmp_path / "grades.csv").open(newline="", encoding="utf-8") as file:
        points = {line["exercise"]: (line["points"], line["outcome"]) for line in csv.DictReader(file)}
    assert points == {MEAN: ("3", "passed"), SPREAD: ("1", "passed"), KERNEL_ID: ("", "not gradable")}


def test_tests_that_cannot_start_say_why(book, tmp_path):
    write(tmp_path / "all/ann" / FILE, CHAPTER)
    broken = tiny_book(tmp_path / "broken")
    write(broken / "tests/conftest.py", "import nowhere\n")
    with pytest.raises(ValueError, match=r"\(error: .*ModuleNotFoundError"):
        grading.grade(tmp_path / "all", root=broken)


def test_an_exercise_is_judged_with_the_others_solved(book):
    found = exercises(book)
    exercise = next(exercise for exercise in found if exercise.function == SPREAD)
    mine = CHAPTER.replace("x.max(-1) - x.min(-1)", "x.max(0)")
    broken = mine.replace("    return total / x.shape[-1]", "    return 0").encode()
    assert grading.with_others_solved(broken, exercise, found, book) == mine.encode()
    assert grading.with_others_solved(b"def spread(x:", exercise, found, book) == b"def spread(x:"
    assert grading.with_others_solved(b"def spread(x): ...", exercise, found, book) == b"def spread(x): ..."
