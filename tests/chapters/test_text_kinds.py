"""Paragraphs by kind: the rule, and that no word is lost on the way into the streams."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from chapters.claims import NotMeasurable
from chapters.lab import Lab
from chapters.shared import text_kinds
from chapters.shared.text_kinds import KINDS, kind, sorted_text, streams_by_task

TEXT = "One line\nof prose.\n\nf(x)\n    The value at x.\n\n    all of it\n\tindented\n\n>>> f(1)\n1"


@pytest.mark.parametrize(("paragraph", "name"), [
    ("One line\nof prose.", "prose"), ("f(x)\n    The value.", "definitions"), ("  f\n\n\tg", "blocks"),
    (">>> f(1)\n1", "examples"), ("See:\n    >>> f(1)", "examples"), ("", "prose"), (" a\nb", "definitions"),
    ("a >>> b", "prose"),
])  # fmt: skip
def test_a_kind_is_a_layout(paragraph, name):
    assert KINDS[kind(paragraph)] == name


def test_streams_hold_each_paragraph_once_and_where_it_belongs():
    lab = Lab()
    tokenizer = lab.tokenizer
    stream = torch.tensor([tokenizer.begin, *tokenizer.encode(TEXT), tokenizer.end, *tokenizer.encode("More prose.")])
    found = [tokenizer.decode(part.tolist()) for part in streams_by_task(stream, tokenizer)]
    assert found == ["One line\nof prose.More prose.", *TEXT.split("\n\n")[1:]]
    ends = [int((part == tokenizer.end).sum()) for part in streams_by_task(stream, tokenizer)]
    assert ends == [3, 2, 2, 2]  # one opens a stream, one closes each document


def test_the_books_text_has_all_kinds_and_every_id_tells_its_own():
    lab = Lab()
    text = sorted_text(lab)
    size = lab.config.vocab_size
    kinds = text.marked // size
    assert kinds.unique().tolist() == list(range(len(KINDS))) and (kinds.diff() >= 0).all()
    assert all(rows.shape[1] == text_kinds.LENGTH and len(rows) > 8 for rows in text.measured)
    letters, before = (Counter(lab.tokenizer.decode(ids.tolist())) for ids in (text.marked % size, lab.train_stream))
    assert all(letters[letter] == count for letter, count in before.items() if not letter.isspace())


def test_text_that_lacks_a_kind_is_refused(tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("Prose and nothing else. " * 40 + name, encoding="utf-8")
    with pytest.raises(NotMeasurable, match="too few definitions"):
        sorted_text(Lab(text=tmp_path))
