"""`python -m chapters mistakes`: an exercise whose tests would let something wrong through is itself found wrong."""

import pytest

from chapters import mistakes
from chapters.__main__ import main
from chapters.workbook import exercises
from tests.books import CHAPTER, HAS_TRITON, KERNEL, tiny_book, write

MEAN = "def mean(x: np.ndarray) -> np.ndarray:\n    return "
SPREAD = "def spread(x):\n    "
JIT = KERNEL[KERNEL.index("@triton.jit") : KERNEL.index("def mean(x)")]
PLANTED = {
    "mean": {"wrong_axis": f"{MEAN}x.mean(0)", "off_by_one": f"{MEAN}x.sum(-1) / 9", "lost_sum": f"{MEAN}x[..., 0]"},
    "spread": {
        "first_minus_last": f"{SPREAD}return x[..., 0] - x[..., -1]",
        "ends_the_process": f"{SPREAD}import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)",
        "raises": f"{SPREAD}return x.spread()",
    },
    "mean_kernel": {
        "no_division": JIT.replace(" / columns)", ")"),
        "no_mask": JIT.replace(", column < columns, 0.0", ""),
        "one_row": JIT.replace("out + row", "out"),
    },
}


def plant(root, function, mistake, source, package="chapters"):
    text = f'"""{package}.demo.mean.{function}: {mistake}."""\n\n\n{source.rstrip()}\n'
    write(root / f"tests/wrong/demo/mean/{function}__{mistake}.py", text)


def plant_all(root):
    for function, variants in PLANTED.items():
        for mistake, source in variants.items():
            plant(root, function, mistake, source, "kernels" if function == "mean_kernel" else "chapters")


@pytest.fixture
def book(tmp_path):
    return tiny_book(tmp_path)


def faults(proofs):
    return {proof.exercise.name: proof.faults for proof in proofs}


def test_a_sound_book_has_no_faults(book, monkeypatch, capsys):
    plant_all(book)
    monkeypatch.setattr(mistakes, "ROOT", book)
    assert main(["mistakes", "mean"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("3 of 3") == (3 if HAS_TRITON else 2)
    assert ("1 exercises in kernel files were not tried" in shown) != HAS_TRITON


def test_what_the_tests_let_through_is_a_fault(book, monkeypatch):
    monkeypatch.setattr(mistakes, "runnable", lambda exercise: exercise.file.parts[0] == "chapters")
    plant_all(book)
    plant(book, "mean", "slow", f"{MEAN}x.sum(-1) * (1 / x.shape[-1])")
    plant(book, "spread", "endless", f"{SPREAD}while True: pass")
    (book / "tests/wrong/demo/mean/spread__raises.py").unlink()
    (book / "tests/wrong/demo/mean/spread__first_minus_last.py").unlink()
    found = faults(mistakes.prove([], book, limit=4))
    assert found["mean"] == ["mean__slow is not found wrong: passed"]
    assert found["spread"] == [
        "2 planted mistakes, at least 3 are needed",
        "spread__endless is not found wrong: timed out (no result after 4 s)",
    ]


def test_a_wrong_solution_and_a_skeleton_that_cannot_be_imported_are_faults(book, monkeypatch):
    monkeypatch.setattr(mistakes, "runnable", lambda exercise: exercise.file.parts[0] == "chapters")
    write(book / "chapters/demo/mean.py", CHAPTER.replace("x.max(-1)", "x.max()") + "MEAN = mean(np.ones(3))\n")
    write(book / "tests/demo/test_more.py", "import pytest\ngraded = pytest.mark.skip\n")
    test = book / "tests/demo/test_mean.py"
    write(test, test.read_text().replace("spread(-np.arange(4)) == 3", "spread(-np.eye(4)).max() == 0"))
    found = faults(mistakes.prove(["mean"], book))
    assert "skeleton is not found wrong: error" in found["mean"][1] and "NotImplementedError" in found["mean"][1]
    assert found["spread"][1].startswith("the solution failed: test_of_negative_numbers: ")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("mean__x", f'"""chapters.demo.mean.mean: x."""\nimport os\n{MEAN}1', "one function, nothing else"),
        ("mean__x", f"{MEAN}1", "one function, nothing else"),
        ("mean__x", f'"""chapters.demo.mean.mean"""\n{MEAN}1', "one function, nothing else"),
        ("mean__x", f'"""chapters.demo.mean.median: x."""\n{MEAN}1', "must start with median__"),
        ("median__x", f'"""chapters.demo.mean.median: x."""\n{MEAN}1', "median is not an exercise"),
        ("mean__x", '"""chapters.demo.mean.mean: x."""\ndef mean(y):\n    return 1', "must begin as the book's"),
        ("mean__x", '"""chapters.demo.mean.mean: x."""\ndef other():\n    return 1', "no top-level function mean"),
        ("mean__x", f'"""chapters.demo.mean.mean: x."""\n@np.vectorize\n{MEAN}1', "got @np.vectorize def mean"),
    ],
)
def test_a_planted_mistake_in_another_form_is_refused(book, name, text, complaint):
    write(book / f"tests/wrong/demo/mean/{name}.py", text)
    with pytest.raises(ValueError, match=rf"{name}\.py: .*{complaint}"):
        mistakes.planted_mistakes(exercises(book), exercises(book), book)
