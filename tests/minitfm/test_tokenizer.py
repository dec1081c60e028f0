"""The tokenizer loses nothing, whatever the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitfm.tokenizer import END, Tokenizer
from tests.minitfm.models import TEXT, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@given(text=st.text() | st.text(alphabet=" \n\t\r") | st.text(alphabet="<|endoftx> "))
def test_any_text_survives(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)
    assert TOKENIZER.end not in ids


def test_a_document_cannot_end_itself():
    assert TOKENIZER.end not in TOKENIZER.encode(f"one{END}two")
    assert TOKENIZER.decode(TOKENIZER.encode(f"one{END}two")) == f"one{END}two"


def test_special_tokens_are_not_shown():
    ids = [TOKENIZER.begin, *TOKENIZER.encode("text"), TOKENIZER.end]
    assert TOKENIZER.begin == TOKENIZER.end == TOKENIZER.inner.token_to_id(END)
    assert TOKENIZER.decode(ids) == "text"


def test_training_merges_what_is_frequent():
    assert TOKENIZER.vocab_size == 280
    assert len(TOKENIZER.encode(TEXT)) < 0.75 * len(TEXT.encode())
    bytes_only = Tokenizer.train([TEXT], 257)
    assert len(bytes_only.encode(TEXT)) == len(TEXT.encode())


def test_it_survives_its_file(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXT) == TOKENIZER.encode(TEXT)
    assert (loaded.begin, loaded.end, loaded.vocab_size) == (TOKENIZER.begin, TOKENIZER.end, TOKENIZER.vocab_size)
    assert loaded.end not in loaded.encode(END)


def test_what_cannot_be_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        Tokenizer.train([TEXT], 256)
    path = tmp_path / "tokenizer.json"
    path.write_text('{"colour": 1}')
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(path)
    with pytest.raises(ValueError, match="end=280 is not an id of a vocabulary of 280"):
        Tokenizer(TOKENIZER.inner, begin=0, end=280)
