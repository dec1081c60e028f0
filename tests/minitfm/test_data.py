"""The corpus: read without importing, split without a leak, drawn the same way for the same seed."""

from __future__ import annotations

import ast
import sys
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitfm import data
from tests.minitfm.models import tiny_tokenizer

NAMES = st.text(alphabet="abcdefgh/", min_size=1, max_size=6)
PARAGRAPHS = st.sampled_from(["short", "one " * 20, "two " * 20, "two\n  " * 20, "three " * 20, "four, all alone " * 9])


def long_paragraphs(documents):
    """Words of every paragraph that is long enough to be a copy."""
    texts = (" ".join(part.split()) for text in documents.values() for part in text.split("\n\n"))
    return [text for text in texts if len(text) >= data.LONG]


@cache
def library():
    before = set(sys.modules)
    found = data.documents()
    return found, set(sys.modules) - before


def test_the_library_documentation_is_there_and_nothing_of_it_was_imported():
    found, imported = library()
    assert {"json/decoder", "argparse", "topic:assert"} <= set(found)
    assert "Utilities for writing code that runs on Python 2 and 3" not in "".join(found.values())  # site-packages
    assert not any({"test", "tests", "lib2to3", "site-packages"} & set(name.split("/")) for name in found)
    assert 1_500_000 < sum(map(len, found.values())) < 3_000_000
    assert not imported & {"antigravity", "turtle", "tkinter", "idlelib", "this"}


def test_documents_are_what_their_modules_say():
    import json.decoder

    found, _ = library()
    for text in (json.decoder.JSONDecoder.__doc__, json.decoder.JSONDecoder.decode.__doc__):
        first = text.strip().splitlines()[0]
        assert first in found["json/decoder"]


def test_the_split_of_the_library_leaks_nothing():
    found, _ = library()
    train, validation = data.split(found)
    assert {**train, **validation} == found and not set(train) & set(validation)
    assert not {name.split("/")[0] for name in train} & {name.split("/")[0] for name in validation}
    assert not set(long_paragraphs(train)) & set(long_paragraphs(validation))
    share = sum(map(len, validation.values())) / sum(map(len, found.values()))
    assert 0.03 < share < 0.08


def test_the_split_does_not_depend_on_the_other_documents():
    found, _ = library()
    held_out = set(data.split(found)[1])
    fewer = {name: text for i, (name, text) in enumerate(found.items()) if i % 3}
    assert set(data.split(fewer)[1]) == held_out & set(fewer)


@given(st.dictionaries(NAMES, PARAGRAPHS, min_size=2))
def test_any_split_has_two_sides_and_keeps_groups_whole(documents):
    groups = {name.split("/")[0] for name in documents}
    if len(groups) == 1:
        with pytest.raises(ValueError, match="one group"):
            data.split(documents)
        return
    train, validation = data.split(documents)
    assert train and validation and {**train, **validation} == documents
    assert not {name.split("/")[0] for name in train} & {name.split("/")[0] for name in validation}


@given(st.lists(st.lists(PARAGRAPHS, max_size=5).map("\n\n".join), min_size=1, max_size=5))
def test_copied_paragraphs_are_kept_once(texts):
    kept = data.unique((str(i), text) for i, text in enumerate(texts))
    found = long_paragraphs(kept)
    assert len(found) == len(set(found))
    assert set(found) == set(long_paragraphs(dict(enumerate(texts))))
    assert "".join(kept.values()).count("short") == "".join(texts).count("short")


def test_docstrings_come_in_the_order_of_the_source():
    source = '''
"""module"""
if True:
    class A:
        """class"""
        def f(self):
            """method"""
            def g():
                """inner"""
        x = 1
        async def h(self):
            """  later
            lines
            """
    "no docstring"
'''
    assert list(data.docstrings(ast.parse(source))) == ["module", "class", "method", "inner", "later\nlines"]


def test_folders_and_files_become_documents(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first text")
    (tmp_path / "sub" / "b.md").write_text("second text")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    assert data.documents(tmp_path) == {"a.txt": "first text", "sub/b.md": "second text"}
    paragraphs = [f"paragraph {i} " * 60 for i in range(40)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    found = data.documents(tmp_path / "long.txt")
    assert list(found)[:2] == ["long.txt#0", "long.txt#1"]
    assert "\n\n".join(found.values()) == "\n\n".join(paragraphs)
    assert all(data.PIECE <= len(text) < data.PIECE + 2000 for text in list(found.values())[:-1])


def test_texts_that_are_none_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no text in"):
        data.documents(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        data.documents(tmp_path)
    with pytest.raises(FileNotFoundError):
        data.documents(tmp_path / "missing")


def test_the_stream_is_documents_between_ends():
    tokenizer = tiny_tokenizer()
    stream = data.encode({"a": "fox", "b": "dog"}, tokenizer)
    assert stream.dtype == torch.int64
    ends = (stream == tokenizer.end).nonzero().flatten().tolist()
    assert ends[0] == 0 and ends[-1] == len(stream) - 1 and len(ends) == 3
    assert tokenizer.decode(stream[1 : ends[1]].tolist()) == "fox"
    assert tokenizer.decode(stream[ends[1] + 1 : -1].tolist()) == "dog"


@given(size=st.integers(1, 40), length=st.integers(1, 45))
def test_sequences_cut_the_stream_without_overlap(size, length):
    stream = torch.arange(size)
    if length > size:
        with pytest.raises(ValueError, match=f"length must be between 1 and the stream's {size} tokens"):
            data.sequences(stream, length)
        return
    cut = data.sequences(stream, length)
    assert cut.shape == (size // length, length)
    assert torch.equal(cut.flatten(), stream[: size // length * length])


@given(size=st.integers(1, 40), batch=st.integers(1, 5), length=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_batches_are_pieces_of_the_stream_decided_by_the_seed(size, batch, length, seed):
    stream = torch.arange(size)
    length = min(length, size)
    drawn = data.random_batch(stream, batch, length, seed)
    assert drawn.shape == (batch, length)
    assert torch.equal(drawn, drawn[:, :1] + torch.arange(length)) and drawn.max() < size
    assert torch.equal(drawn, data.random_batch(stream, batch, length, seed))


def test_batches_of_different_seeds_differ_and_reach_both_ends():
    stream = torch.arange(10)
    drawn = [data.random_batch(stream, 8, 4, (0, step)) for step in range(30)]
    assert len({tuple(batch[:, 0].tolist()) for batch in drawn}) == 30
    assert torch.cat(drawn)[:, 0].unique().tolist() == list(range(7))
    assert not torch.equal(data.random_batch(stream, 8, 4, 1), data.random_batch(stream, 8, 4, 1 + 2**32))


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (2, 11)])
def test_impossible_batches_are_refused(batch, length):
    with pytest.raises(ValueError, match="need batch >= 1 and 1 <= length <= 10"):
        data.random_batch(torch.arange(10), batch, length, 0)
