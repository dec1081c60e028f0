"""The exercises: found in the tests, emptied for the student, and written without ever costing anybody's work."""

import ast

import pytest

from chapters.__main__ import main
from chapters.workbook import STUB, choose, exercises, find_function, skeleton, splice, write_exercises
from tests.books import CHAPTER, KERNEL, tiny_book, write


@pytest.fixture
def book(tmp_path):
    return tiny_book(tmp_path)


@pytest.fixture
def command(book, monkeypatch):
    """`python -m chapters …` in the tiny book."""
    monkeypatch.chdir(book)
    for module in ("workbook", "mistakes", "grading"):
        monkeypatch.setattr(f"chapters.{module}.ROOT", book)
    return lambda line: main(line.split())


def test_exercises_are_found_in_the_tests_with_their_points(book):
    found = {exercise.function: exercise for exercise in exercises(book)}
    assert {function: exercise.points for function, exercise in found.items()} == {
        "chapters.demo.mean.mean": 3,
        "chapters.demo.mean.spread": 1,
        "kernels.demo.mean.mean_kernel": 2,
    }
    spread = found["chapters.demo.mean.spread"]
    assert spread.name == "spread" and str(spread.file) == "chapters/demo/mean.py"
    assert spread.tests == (book / "tests/demo/test_mean.py",) and spread.techniques == {"demo.mean"}


def test_a_mark_counts_wherever_it_stands(book):
    mark = 'pytest.mark.exercise("chapters.demo.mean.mean", points=3)'
    text = f"import pytest\n\npytestmark = [{mark}]\ngraded = {mark}\n\n@graded\ndef test(): pass\n"
    write(book / "tests/demo/test_more.py", text)
    mean = exercises(book)[0]
    assert [path.name for path in mean.tests] == ["test_mean.py", "test_more.py"]
    assert mean.techniques == {"demo.mean", "demo.more"}


@pytest.mark.parametrize(
    ("mark", "complaint"),
    [
        ('"chapters.demo.mean.mean", points=4', "is worth 3 points elsewhere, 4 here"),
        ('"chapters.demo.mean.median", points=1', "there is no top-level function median"),
        ('"chapters.demo.median.mean", points=1', "names no function of a chapter"),
        ('"minitfm.model.Transformer", points=1', "names no function of a chapter"),
        ('"chapters.demo.mean.SPREADS", points=1', "there is no top-level function SPREADS"),
        ('"chapters.demo.mean.mean"', "write the mark out"),
        ('"chapters.demo.mean.mean", 3', "write the mark out"),
        ('"chapters.demo.mean.mean", points=0', "write the mark out"),
        ('"chapters.demo.mean.mean", points=True', "write the mark out"),
        ("NAME, points=3", "write the mark out"),
        ('"chapters.demo.mean.mean", points=(3', "never closed"),
    ],
)
def test_a_mark_that_cannot_be_right_is_refused_with_its_place(book, mark, complaint):
    write(book / "tests/demo/test_more.py", f"import pytest\n@pytest.mark.exercise({mark})\ndef test(): pass\n")
    with pytest.raises(ValueError, match=rf"test_more\.py:2: .*{complaint}"):
        exercises(book)


def test_the_skeleton_keeps_everything_but_the_bodies(book):
    text = skeleton(book / "chapters/demo/mean.py", ["mean", "spread"])
    stub = "\n".join(" " * 4 + line for line in STUB)
    assert (
        text
        == f'''"""Means."""

import numpy as np


def mean(x: np.ndarray) -> np.ndarray:
    """Mean of the last axis."""
{stub}


def spread(x):
{stub}


SPREADS = {{"none": 0}}
'''
    )


def test_the_skeleton_of_a_kernel_keeps_its_decorator_and_the_wrapper(book):
    text = skeleton(book / "kernels/demo/mean.py", ["mean_kernel"])
    start = KERNEL.index("@triton.jit")
    assert text.startswith(KERNEL[: KERNEL.index("    row = ", start)])
    assert "tl.load" not in text and text.endswith(KERNEL[KERNEL.index("def mean(x)") :])


@pytest.mark.parametrize(
    "body",
    [
        "(\n    a,  # first\n    b=(1, 2),\n):\n    return a",
        "(a):\n    @staticmethod\n    def inner(): pass\n    return inner",
        '(a):\n    """Two\n    lines."""',
        "(a):\n\n    # a hint\n\n    # another\n    for b in a:\n        pass\n    # the last hint\n\n    # and more\n",
    ],
)
def test_no_skeleton_gives_the_body_away(tmp_path, body):
    write(tmp_path / "some.py", f"def before(): pass\n\n\ndef task{body}\n\n\n# after\ndef after(): pass\n")
    text = skeleton(tmp_path / "some.py", ["task"])
    task = find_function(text, "task", "")
    assert ast.unparse(task.body[-1]) == "raise NotImplementedError" and len(task.body) <= 2
    assert ast.unparse(task.args) == ast.unparse(find_function(f"def task{body}", "task", "").args)
    assert "hint" not in text and "more" not in text and "# after" in text and "def after(): pass" in text


def test_a_function_on_one_line_is_refused(tmp_path):
    write(tmp_path / "some.py", "def task(a): return a\n")
    with pytest.raises(ValueError, match="task must not stand on one line"):
        skeleton(tmp_path / "some.py", ["task"])


def test_splice_puts_a_function_with_its_decorators_in_the_other_s_place():
    text = splice(KERNEL, "mean_kernel", "\n@triton.jit\ndef mean_kernel(x):\n    pass\n")
    assert text.count("@triton.jit") == 1 and "tl.load" not in text
    assert text.replace("@triton.jit\ndef mean_kernel(x):\n    pass", "") == splice(KERNEL, "mean_kernel", "")


def test_chapters_are_chosen_by_name(book):
    found = exercises(book)
    assert choose(found, []) == choose(found, ["mean"]) == choose(found, ["demo.mean"]) == found
    with pytest.raises(ValueError, match=r"no chapter with exercises is called 'meam'; did you mean 'mean'\?"):
        choose(found, ["meam"])
    with pytest.raises(ValueError, match=r"known are demo\.mean"):
        choose(found, ["xyz.xyz"])


def test_the_exercise_command_writes_the_files_and_says_how_to_verify(command, book, capsys):
    assert command("exercise mean --to my") == 0
    assert (book / "my/chapters/demo/mean.py").read_text().count("NotImplementedError") == 2
    assert (book / "my/kernels/demo/mean.py").read_text().count("NotImplementedError") == 1
    shown = capsys.readouterr().out
    assert "my/chapters/demo/mean.py: write mean (3 points), spread (1 point)\n" in shown
    assert "    python -m pytest --submission=my tests/demo/test_mean.py\n" in shown


def test_only_one_function_can_be_asked_for(command, book, capsys):
    assert command("exercise demo.mean --to my --only spread") == 0
    text = (book / "my/chapters/demo/mean.py").read_text()
    assert text.count("NotImplementedError") == 1 and "x.sum(-1)" in text
    assert not (book / "my/kernels").exists()
    assert command("exercise mean --to other --only medium") == 2
    assert "no exercise of mean is called 'medium'; did you mean 'mean'?" in capsys.readouterr().err


def test_work_that_is_there_is_never_overwritten_unless_forced(command, book, capsys):
    write(book / "my/kernels/demo/mean.py", "my work")
    assert command("exercise mean --to my") == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert (book / "my/kernels/demo/mean.py").read_text() == "my work"
    assert not (book / "my/chapters").exists(), "all files or none"
    assert command("exercise mean --to my --force") == 0
    assert "YOUR CODE HERE" in (book / "my/kernels/demo/mean.py").read_text()


def test_the_book_itself_is_never_emptied(book):
    with pytest.raises(ValueError, match="is the book itself"):
        write_exercises(exercises(book), book / "my" / "..", force=True, root=book)
    assert (book / "chapters/demo/mean.py").read_text() == CHAPTER


@pytest.mark.parametrize("line", ["exercise meam --to my", "exercise mean --to file", "mistakes meam", "grade nowhere"])
def test_bad_input_is_one_line_and_exit_code_2(command, book, capsys, line):
    write(book / "file", "a file where a folder is needed")
    assert command(line) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_exercise_of_the_book_leaves_a_file_that_can_be_read(tmp_path):
    found = exercises()
    written = write_exercises(found, tmp_path / "my")
    assert sum(len(inside) for inside in written.values()) == len(found)
    for path in written:
        compile(path.read_text(encoding="utf-8"), str(path), "exec")
