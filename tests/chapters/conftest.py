"""A tiny model on a tiny text, and a book of three made-up chapters: one holds, one raises, one does not hold."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from chapters import claims, contents
from chapters.contents import Entry
from chapters.figures import figure, series
from chapters.lab import Lab
from minitfm import checkpoint, data
from minitfm.config import Config
from minitfm.model import Transformer
from minitfm.tokenizer import Tokenizer

WORDS = "a model reads the tokens of a text and writes what it expects to come next".split()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of 40 texts in groups of their own."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        words = [WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(300)]
        (folder / f"text{i}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, text):
    """A checkpoint of two random layers whose context is shorter than the book's usual 128 tokens."""
    torch.manual_seed(0)
    config = Config(vocab_size=270, dim=16, hidden_dim=24, layers=2, heads=2, context=48)
    tokenizer = Tokenizer.train(data.documents(text).values(), 270)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.save(folder, Transformer(config), tokenizer)
    return folder


@pytest.fixture
def lab(tiny, text):
    return Lab(path=tiny, text=text)


@pytest.fixture
def full_lab(tiny, text):
    return Lab(full=True, path=tiny, text=text)


def holds(lab):
    drawn, axes = figure()
    axes.plot([2, 3, 4], [9.0, 5.0, 4.0], **series("method"), label="ours")
    axes.set(xlabel="bits", ylabel="loss", title="Loss falls")
    numbers = {"base perplexity": lab.base_perplexity, "broken": float("inf")}
    return claims.Claim("It helps & <b>holds</b>.", True, numbers, drawn, "two layers", infinite=("broken",))


def raises(lab):
    raise RuntimeError("the weights\nare not finite")


def fails_to_hold(lab):
    return claims.Claim("It does not show here.", False, {"difference": 0.25}, None, "two layers")


@pytest.fixture
def book(monkeypatch, tmp_path):
    """The three chapters in place of the real ones: their modules by name, to be given other functions."""
    modules, entries = {}, []
    for name, claim in (("holds", holds), ("raises", raises), ("shows_not", fails_to_hold)):
        entry = Entry("sparsity", name, name.capitalize(), "One idea.", "Author 2020", "https://example.org", "x.y")
        modules[name] = types.ModuleType(f"chapters.{entry.dotted}")
        modules[name].claim = claim
        monkeypatch.setitem(sys.modules, modules[name].__name__, modules[name])
        entries.append(entry)
    monkeypatch.setattr(contents, "CONTENTS", tuple(entries))
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    return modules
