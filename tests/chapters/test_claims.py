"""A claim is refused unless it was measured; its record says all that it depends on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from chapters import claims, contents
from chapters.claims import RESULTS, Claim, record, recorded, require_writable, run_claim

NUMBERS = {"perplexity": 23.5}


def test_a_numpy_comparison_is_a_verdict_and_a_numpy_number_a_number():
    claim = Claim("It holds.", np.float64(1) < 2, {"x": np.float32(0.5)}, None, "here")
    assert claim.holds is True and type(claim.numbers["x"]) is float


@pytest.mark.parametrize("verdict", [1, "yes", None, 0.0])
def test_a_verdict_must_be_a_bool(verdict):
    with pytest.raises(TypeError, match="holds must be a bool"):
        Claim("It holds.", verdict, NUMBERS, None, "here")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_no_measurement(value):
    with pytest.raises(ValueError, match="the number 'loss' is"):
        Claim("It holds.", True, {"loss": value}, None, "here")


def test_a_number_may_be_infinite_on_purpose_but_never_nan():
    assert Claim("It broke.", True, {"loss": math.inf}, None, "here", infinite=("loss",)).numbers["loss"] == math.inf
    with pytest.raises(ValueError, match="nan"):
        Claim("It broke.", True, {"loss": math.nan}, None, "here", infinite=("loss",))


@pytest.mark.parametrize(("sentence", "numbers"), [(" ", NUMBERS), ("It holds.", {})])
def test_a_claim_needs_a_sentence_and_numbers(sentence, numbers):
    with pytest.raises(ValueError, match="needs a sentence and at least one number"):
        Claim(sentence, True, numbers, None, "here")


def test_every_kind_of_outcome_has_its_verdict(book, lab):
    results = [run_claim(entry, lab) for entry in contents.CONTENTS]
    assert [result.verdict for result in results] == ["reproduced", "failed", "not reproduced"]
    good, bad, _ = results
    assert good.error is None and good.picture.startswith(b"\x89PNG")
    assert bad.claim is None and bad.error == "RuntimeError: the weights" and "in raises" in bad.traceback


def test_what_is_not_a_claim_or_not_there_is_a_failure(book, lab):
    book["holds"].claim = lambda lab: {"holds": True}
    assert run_claim(contents.find("holds"), lab).error.startswith(
        "TypeError: chapters.sparsity.holds.claim must return"
    )
    del book["holds"].claim
    assert "AttributeError" in run_claim(contents.find("holds"), lab).error


def test_random_numbers_are_the_chapters_own(book, lab):
    book["holds"].claim = lambda lab: Claim("Drawn.", True, {"x": torch.rand(()).item()}, None, "here")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = run_claim(contents.find("holds"), lab).claim.numbers
    assert torch.equal(torch.rand(3), expected), "a claim leaves the random state as it was"
    assert run_claim(contents.find("holds"), lab).claim.numbers == first


def test_an_interrupt_is_not_a_failure(book, lab):
    def interrupted(lab):
        raise KeyboardInterrupt

    book["holds"].claim = interrupted
    with pytest.raises(KeyboardInterrupt):
        run_claim(contents.find("holds"), lab)


def test_a_record_is_read_back_as_it_was_measured(book, full_lab):
    result = run_claim(contents.find("holds"), full_lab)
    path = record(result, full_lab)
    outcome = recorded("holds")
    assert outcome["numbers"] == result.claim.numbers and outcome["numbers"]["broken"] == math.inf
    assert outcome["holds"] is True and outcome["seeds"] == [0, 1, 2] and outcome["technique"] == "sparsity.holds"
    assert outcome["versions"].keys() >= {"python", "numpy", "torch"} and outcome["lab"]["measured tokens"] > 0
    assert [file.name for file in path.parent.iterdir()] == ["holds.json"]


def test_only_full_runs_that_worked_are_recorded(book, lab, full_lab):
    with pytest.raises(ValueError, match="a quick run"):
        record(run_claim(contents.find("holds"), lab), lab)
    with pytest.raises(ValueError, match="a failed run"):
        record(run_claim(contents.find("raises"), full_lab), full_lab)
    assert recorded("holds") is None and recorded("raises") is None


def test_a_record_that_cannot_be_written_leaves_the_old_one(book, full_lab, monkeypatch):
    result = run_claim(contents.find("shows_not"), full_lab)
    before = record(result, full_lab).read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        record(result, full_lab)
    assert [file.read_bytes() for file in claims.RESULTS.iterdir()] == [before]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"numbers": {"x": []}}', '{"holds": true}'])
def test_a_damaged_record_is_named(book, content):
    claims.RESULTS.mkdir()
    (claims.RESULTS / "holds.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds\.json is damaged .* --full"):
        recorded("holds")


def test_writable_is_asked_without_leaving_a_trace(tmp_path):
    require_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"cannot write to .*below: Not a directory"):
        require_writable(tmp_path / "file" / "below")


@pytest.mark.parametrize("entry", contents.CONTENTS, ids=lambda entry: entry.name)
def test_the_book_has_a_full_record_of_every_claim(entry):
    outcome = recorded(entry.name)
    assert outcome, f"run: python -m chapters claim {entry.name} --full"
    assert outcome["technique"] == entry.dotted and len(outcome["seeds"]) >= 3
    assert outcome["lab"]["model"] == "the book's base model" and type(outcome["holds"]) is bool


def test_every_record_belongs_to_a_chapter():
    assert {path.stem for path in RESULTS.glob("*.json")} <= {entry.name for entry in contents.CONTENTS}
    assert json.dumps([recorded(path.stem) for path in RESULTS.glob("*.json")])
