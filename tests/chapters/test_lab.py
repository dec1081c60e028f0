"""What a claim may rely on: fresh models, text that never mixes, numbers that never change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chapters import lab as labs
from chapters.lab import Lab
from minitfm import checkpoint, data, evaluate
from minitfm.model import causal_attention
from minitfm.tokenizer import Tokenizer


def windows(stream: torch.Tensor, length: int) -> set[tuple[int, ...]]:
    return {tuple(row) for row in stream.unfold(0, length, 1).tolist()}


def test_a_model_is_a_fresh_copy_of_the_checkpoint(lab, tiny):
    first = lab.model()
    assert not first.training
    for parameter in first.parameters():
        parameter.data.zero_()
    fresh, original = lab.model().state_dict(), checkpoint.load(tiny).model.state_dict()
    assert all(torch.equal(fresh[name], original[name]) for name in original)


def test_a_model_takes_the_seams(lab):
    seen = []

    def attend(q, k, v):
        seen.append(q.shape)
        return causal_attention(q, k, v)

    tokens = lab.validation[:2]
    assert torch.equal(lab.model(attend=attend)(tokens), lab.model()(tokens))
    assert len(seen) == lab.config.layers


def test_making_a_model_uses_no_random_numbers(lab):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    lab.model()
    assert torch.equal(torch.rand(4), expected)


def test_calibration_is_drawn_by_its_seed_from_the_training_text(lab):
    drawn = lab.calibration(seed=1, count=6, length=20)
    assert drawn.shape == (6, 20) and drawn.dtype == torch.int64
    assert torch.equal(drawn, lab.calibration(seed=1, count=6, length=20))
    assert not torch.equal(drawn, lab.calibration(seed=2, count=6, length=20))
    assert {tuple(row) for row in drawn.tolist()} <= windows(lab.train_stream, 20)


def test_measuring_text_is_validation_text_only(lab, text):
    train, validation = data.split(data.documents(text))
    assert not set(train) & set(validation)
    assert torch.equal(lab.train_stream, data.encode(train, lab.tokenizer))
    held = windows(data.encode(validation, lab.tokenizer), lab.length)
    assert {tuple(row) for row in lab.validation.tolist()} <= held


def test_the_budgets_differ_in_seeds_time_and_text(lab, full_lab, monkeypatch):
    monkeypatch.setattr(labs, "QUICK_SEQUENCES", 5)
    assert lab.seeds == (0,) and len(full_lab.seeds) >= 3 and lab.seconds < full_lab.seconds
    assert len(lab.validation) == 5 < len(full_lab.validation)
    everything = data.sequences(full_lab.streams[1], full_lab.length)
    assert torch.equal(lab.validation[[0, -1]], everything[[0, -1]]), "the slice spans the whole stream"


def test_a_short_context_shortens_the_sequences(lab):
    assert lab.length == lab.config.context == 48
    assert lab.validation.shape[1] == lab.calibration(count=2).shape[1] == 48


def test_perplexity_is_that_of_the_measuring_text(lab):
    assert lab.perplexity(lab.model()) == evaluate.perplexity(lab.model(), lab.validation)
    assert lab.base_perplexity == lab.perplexity(lab.model())


def test_once_computes_once(lab):
    calls = []
    assert [lab.once(("key", i), lambda: calls.append(0) or len(calls)) for i in (1, 1, 2)] == [1, 1, 2]


@pytest.fixture
def library(monkeypatch, tmp_path, text):
    """The tiny text in place of the standard library's; the list of times it was read."""
    reads = []

    def documents(path=None):
        reads.append(path)
        return original(text)

    original = data.documents
    monkeypatch.setattr(data, "documents", documents)
    monkeypatch.setattr(labs, "cache_folder", lambda: tmp_path / "cache")
    return reads


def test_the_library_is_read_once_and_then_kept(library, tiny):
    first, second = Lab(path=tiny).streams, Lab(path=tiny).streams
    assert len(library) == 1
    assert all(torch.equal(a, b) and b.dtype == torch.int64 for a, b in zip(first, second, strict=True))


def test_another_tokenizer_does_not_meet_the_kept_tokens(library, tiny, text):
    labs.library_streams(Lab(path=tiny).tokenizer)
    other = Tokenizer.train(["entirely different words"], 260)
    train, _ = labs.library_streams(other)
    assert torch.equal(train, data.encode(data.split(data.documents(text))[0], other))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_damaged_cache_is_replaced(library, tiny, content):
    lab = Lab(path=tiny)
    expected = lab.streams
    (kept,) = labs.cache_folder().iterdir()
    kept.write_bytes(content)
    assert torch.equal(Lab(path=tiny).train_stream, expected[0])
    assert set(np.load(kept).files) == {"train", "validation"}


def test_a_cache_folder_that_cannot_be_made_does_no_harm(library, tiny, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(Lab(path=tiny).train_stream) > 0
    assert (tmp_path / "cache").read_text() == "a file where the folder should be"


def test_a_lab_without_its_model_is_refused_at_once(tmp_path):
    with pytest.raises(checkpoint.CheckpointError):
        Lab(path=tmp_path / "nothing")
