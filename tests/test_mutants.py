"""Mutation testing: what is changed, what is not, and that a score says what the tests found."""

from __future__ import annotations

import ast

import pytest

from chapters import mutants
from chapters.__main__ import main
from chapters.workbook import choose, exercises
from tests.books import tiny_book, write

SOURCE = '''def f(x: int, k: int = 1) -> int:
    """Twice x."""
    if x < 0:
        raise ValueError(f"x must be at least {0}")
    y = x.astype(np.float64)
    return 2 * len(y) + k
'''


def changed():
    return {(mutant.before, mutant.after) for mutant in mutants.mutants(SOURCE, "a.b.c.f")}


def test_numbers_operators_comparisons_and_defaults_are_changed():
    for after in ("if x <= 0:", "if x < 1:", "return 3 * len(y) + k", "return 2 / len(y) + k", "return 2 * len(y) - k"):
        assert after in {mutant for _, mutant in changed()}
    assert ("def f(x: int, k: int = 1) -> int:", "def f(x: int, k: int = 2) -> int:") in changed()


def test_what_is_raised_texts_and_the_dtype_that_none_means_are_not():
    said = " ".join(after for _, after in changed())
    assert "raise" not in said and "Twice" not in said and "astype(None)" not in said


def test_mutants_are_python_differ_and_come_once():
    found = mutants.mutants(SOURCE, "a.b.c.f")
    assert (
        len({ast.dump(ast.parse(mutant.source)) for mutant in found} | {ast.dump(ast.parse(SOURCE))}) == len(found) + 1
    )


def test_a_sample_is_spread_over_all():
    found = mutants.mutants(SOURCE, "a.b.c.f")
    assert mutants.spread(found, 3) == [found[0], found[len(found) // 3], found[2 * len(found) // 3]]
    assert mutants.spread(found, 1000) == found


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return tiny_book(tmp_path_factory.mktemp("book"))


SURVIVOR = "return x.max(None) - x.min(-1)"  # the tiny book takes spreads of vectors only


def test_a_mutant_that_passes_survives_until_it_is_named_with_a_reason(book):
    chosen = [each for each in choose(exercises(book), ["mean"]) if each.name == "spread"]
    score = mutants.measure(chosen, book, limit=30)
    assert f"chapters.demo.mean.spread: return x.max(-1) - x.min(-1) -> {SURVIVOR}" in score.survivors
    assert score.caught >= 3 and score.mutants == score.caught + len(score.survivors)
    write(book / mutants.EQUIVALENT, f"""
        [[mutant]]
        function = "chapters.demo.mean.spread"
        change = "{SURVIVOR}"
        because = "a vector has one axis"
    """)  # fmt: skip
    named = mutants.measure(chosen, book, limit=30)
    assert (named.equivalent, len(named.survivors)) == (1, len(score.survivors) - 1) and named.share > score.share


@pytest.mark.parametrize(("caught", "equivalent", "share"), [(3, 1, 1.0), (2, 0, 0.5), (0, 4, 1.0)])
def test_the_share_leaves_equivalent_ones_out(caught, equivalent, share):
    assert mutants.Score(4, caught, equivalent).share == pytest.approx(share)


def test_a_score_is_of_the_files_that_were_measured(book, tmp_path, monkeypatch):
    found = exercises(book)
    monkeypatch.setattr(mutants, "KEPT", tmp_path / "mutants.json")
    own = mutants.graded("demo.mean", found)
    mutants.write({"demo.mean": mutants.Score(4, 4, checksum=mutants.checksum(own, book))})
    mutants.write({"demo.other": mutants.Score(1, 1)})
    assert mutants.read()["demo.mean"].caught == 4 and mutants.current("demo.mean", found, book)
    assert mutants.current("demo.other", found, book) is None is mutants.current("demo.none", found, book)


def test_named_mutants_have_reasons(tmp_path):
    functions = {each.function for each in exercises()}
    assert all(function in functions and change for function, change in mutants.equivalents())
    (tmp_path / "tests" / "wrong").mkdir(parents=True)
    (tmp_path / mutants.EQUIVALENT).write_text('[[mutant]]\nfunction = "f"\nchange = "x"\n')
    with pytest.raises(ValueError, match="entry 1 must have function, change and because"):
        mutants.equivalents(tmp_path)


def test_a_wrong_command_is_one_line(capsys):
    assert main(["mutants", "routing", "--sample", "0"]) == 2
    assert "--sample must be at least 1, got 0" in capsys.readouterr().err
