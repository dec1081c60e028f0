"""Hints: they belong to exercises, come one at a time, and end with what others got wrong."""

from __future__ import annotations

import pytest

from chapters import hints
from chapters.__main__ import main
from chapters.workbook import exercises

KNOWN = [exercise.function for exercise in exercises()]


def test_every_hint_belongs_to_an_exercise_and_says_something_new():
    for function, steps in hints.read().items():
        assert function in KNOWN
        assert len(set(steps)) == len(steps) and all(20 < len(step) < 700 for step in steps)


@pytest.mark.parametrize("function", KNOWN)
def test_every_exercise_has_a_last_hint_from_its_planted_mistakes(function):
    assert len(hints.mistakes(function)) >= 3
    assert hints.steps(function)[-1].startswith("Others went wrong")


def test_hints_come_one_at_a_time(capsys):
    count = len(hints.steps("chapters.quantization.gptq.gptq"))
    for step in range(1, count + 1):
        hints.show("chapters.quantization.gptq.gptq", step)
        said = capsys.readouterr().out
        assert f"hint {step} of {count}" in said and ("--step" in said) == (step < count)


def test_a_hint_is_found_by_a_short_name(capsys):
    assert main(["hint", "gptq.gptq"]) == 0
    assert capsys.readouterr().out.startswith("chapters.quantization.gptq.gptq, hint 1 of ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["gptq.gptq", "--step", "99"], "hints, got --step 99"),
        (["gptq.gptqq"], "did you mean"),
        (["quantize"], "could be "),
    ],
)
def test_a_wrong_question_is_one_line(capsys, arguments, complaint):
    assert main(["hint", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


@pytest.mark.parametrize("text", ["a = ", 'a = "text"', "a = []", 'a = [""]', "a = [1]"])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "hints.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"hints\.toml"):
        hints.read(tmp_path / "hints.toml")
