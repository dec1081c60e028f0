"""The final project: what storage costs, that a model comes from its parts alone, and what `compress` must achieve."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.course.project import LIMIT, Quantized, baseline, compress, nearest_codes, restore, restored, stored_bits
from chapters.lab import Lab
from minitfm import evaluate
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import oracle


@pytest.fixture(scope="module")
def lab():
    return Lab()


@pytest.fixture(scope="module")
def bar(lab):
    """The perplexity to beat."""
    return lab.perplexity(restore(baseline(lab.model()), lab.config))


def judged(parts, lab, names=None):
    """(bits per parameter, perplexity) of a student's parts, by the book's own rules and nothing of the student's."""
    book = oracle("course.project")
    fields = ("codes", "scale", "zero", "group_of_column")
    own = {
        name: book.Quantized(*(np.array(getattr(part, field)) for field in fields), part.bits)
        if hasattr(part, "codes")
        else np.array(part)
        for name, part in parts.items()
    }
    text = lab.validation if names is None else names[lab.validation]
    return book.stored_bits(own) / lab.parameters, evaluate.perplexity(book.restore(own, lab.config), text)


def renamed(model, names):
    """The same model for a text in which token t is called names[t]."""
    model.embedding.weight.data[names] = model.embedding.weight.data.clone()
    return model


@pytest.mark.exercise("chapters.course.project.compress", points=10)
class TestCompress:
    def test_it_keeps_the_limit_and_beats_rounding(self, lab, bar, record_property):
        bits, perplexity = judged(compress(lab.model(), lab.calibration(count=64)), lab)
        record_property("bits per parameter", round(bits, 3))
        record_property("perplexity", round(perplexity, 3))
        assert bits <= LIMIT
        assert perplexity < bar

    def test_it_compresses_the_model_that_it_is_given(self, lab, bar):
        names = torch.randperm(lab.config.vocab_size, generator=torch.Generator().manual_seed(0))
        tokens = names[lab.calibration(seed=1, count=64)]
        bits, perplexity = judged(compress(renamed(lab.model(), names), tokens), lab, names)
        assert bits <= LIMIT
        assert perplexity < bar


def test_the_baseline_keeps_the_limit_itself(lab):
    assert stored_bits(baseline(lab.model())) <= LIMIT * lab.parameters


def test_a_renamed_model_is_as_good_on_the_renamed_text(lab):
    names = torch.arange(lab.config.vocab_size).flip(0)
    found = evaluate.perplexity(renamed(lab.model(), names), names[lab.validation])
    assert found == pytest.approx(lab.base_perplexity)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9))
def test_codes_cost_their_bits_and_their_grids(bits, rows, groups, size):
    codes = np.full((rows, groups * size), 2**bits - 1, np.uint8)
    grids = np.ones((rows, groups)), np.zeros((rows, groups))
    part = Quantized(codes, *grids, np.arange(groups * size) // size, bits)
    assert stored_bits({"a": part}) == codes.size * bits + rows * groups * (16 + bits)


def test_what_is_mostly_zero_costs_a_bitmap_and_the_rest():
    sparse = np.zeros((4, 32))
    sparse[0, :3] = 15 / 8
    assert stored_bits({"a": sparse, "b": np.ones(5)}) == 4 * 32 + 3 * 16 + 5 * 16
    codes = nearest_codes(sparse, None, 4)
    assert stored_bits({"a": codes}) == 4 * 32 + 3 * 4 + 4 * 20
    assert np.array_equal(restored(codes), sparse) and np.array_equal(restored(sparse), sparse)


def test_parts_are_all_that_restore_knows():
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=64, dim=64, hidden_dim=64, layers=1, heads=2, kv_heads=2)).eval()
    parts = baseline(model)
    small, tokens = restore(parts, model.config), torch.randint(64, (1, 9))
    for name, part in parts.items():
        assert torch.equal(small.state_dict()[name], torch.from_numpy(restored(part)))
    assert not torch.equal(small(tokens), model(tokens))
    with pytest.raises(ValueError, match=r"1 tensors are missing, norm\.weight first"):
        restore({name: part for name, part in parts.items() if name != "norm.weight"}, model.config)


WRONG = {
    "finite in float16": lambda part: np.full(3, 1e6),
    "an array or Quantized": lambda part: changed(part, bits=9),
    "uint8 codes below 8": lambda part: changed(part, codes=part.codes + 8),
    "a scale and a zero point for each row": lambda part: changed(part, zero=part.zero[:, :1]),
    "integer zero points": lambda part: changed(part, zero=part.zero + 0.5),
    "integer zero points from 0 to 7": lambda part: changed(part, zero=part.zero + 8),
    "groups of neighbouring columns": lambda part: changed(part, group_of_column=part.group_of_column[::-1].copy()),
    "scales that are finite": lambda part: changed(part, scale=part.scale * 1e9),
}


def changed(part, **fields):
    return Quantized(**{**vars(copy.deepcopy(part)), **fields})


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_stored_is_refused_by_name(words):
    part = nearest_codes(np.random.default_rng(0).standard_normal((4, 16)), 8, 3)
    assert stored_bits({"a": part})
    with pytest.raises(ValueError, match=f"a must .*{words}"):
        stored_bits({"a": WRONG[words](part)})
