"""`pytest --submission DIR`: the student's files are tested, and nothing is green that was not."""

import pytest

from tests.books import CHAPTER, HAS_TRITON, KERNEL, pytest_in, tiny_book, write

WRONG = CHAPTER.replace("x.sum(-1)", "x.sum(0)")


@pytest.fixture
def book(tmp_path):
    return tiny_book(tmp_path)


def test_the_book_itself_is_green_and_says_what_ran(book):
    code, output = pytest_in(book)
    assert code == 0 and output.startswith("under test: the book\nkernels: 1 tests ")


def test_the_submission_s_files_are_the_ones_tested(book):
    write(book / "my/chapters/demo/mean.py", WRONG)
    code, output = pytest_in(book, "--submission", "my")
    assert code == 1 and f"under test: {book / 'my'} (chapters/demo/mean.py)" in output
    assert "FAILED tests/demo/test_mean.py::test_mean" in output
    assert "1 failed" in output, "the kernel keeps the book's chapter as its oracle, whatever was submitted"


def test_a_submission_may_lie_elsewhere_and_the_rest_comes_from_the_book(book, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    write(other / "chapters/demo/mean.py", CHAPTER)
    code, output = pytest_in(book, f"--submission={other}", "tests/demo")
    assert code == 0 and f"under test: {other} " in output


@pytest.mark.skipif(not HAS_TRITON, reason="Triton exists for Linux only; the session's second line says so")
def test_a_submitted_kernel_is_the_one_that_runs(book):
    write(book / "my/kernels/demo/mean.py", KERNEL.replace("column < columns, 0.0", "column < 2 * columns, 0.0"))
    code, output = pytest_in(book, "--submission=my", "--profile=verdict")
    assert code == 1 and "1 failed" in output and "test_kernel" in output


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        (None, "no such folder"),
        ("notes.txt", "holds no chapters/<part>/<technique>.py"),
        ("chapters/__init__.py", "holds no chapters/<part>/<technique>.py"),
        ("chapters/demo/means.py", "the book has no chapters/demo/means.py; did you mean chapters/demo/mean.py?"),
        ("chapters/mean.py", "the book has no chapters/mean.py; did you mean chapters/demo/mean.py?"),
        ("mean.py", "the book has no mean.py; did you mean chapters/demo/mean.py?"),
    ],
)
def test_wrong_names_are_usage_errors(book, file, complaint):
    if file:
        write(book / "my" / file, CHAPTER)
    code, output = pytest_in(book, "--submission=my")
    assert code == pytest.ExitCode.USAGE_ERROR and complaint in output


def test_a_file_that_leads_out_of_the_submission_is_a_usage_error(book):
    (book / "my/chapters/demo").mkdir(parents=True)
    (book / "my/chapters/demo/mean.py").symlink_to(book / "chapters/demo/mean.py")
    code, output = pytest_in(book, "--submission=my")
    assert code == pytest.ExitCode.USAGE_ERROR and "chapters/demo/mean.py links out of the folder" in output


def test_a_submission_that_no_chosen_test_imports_is_an_error(book):
    write(book / "chapters/demo/other.py", "")
    write(book / "my/chapters/demo/other.py", "")
    code, output = pytest_in(book, "--submission=my")
    assert code == pytest.ExitCode.USAGE_ERROR and "no chosen test imports chapters/demo/other.py" in output


def test_the_broken_import_of_a_submission_is_an_error(book):
    write(book / "my/chapters/demo/mean.py", "import nowhere\n" + CHAPTER)
    code, output = pytest_in(book, "--submission=my")
    assert code == pytest.ExitCode.INTERRUPTED and "No module named 'nowhere'" in output
