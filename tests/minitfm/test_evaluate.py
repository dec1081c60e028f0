"""The measures against their definitions, and windows that score every token once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitfm import evaluate
from minitfm.cache import KVCache
from tests.minitfm.models import TEXT, tiny_model, tiny_tokenizer, tokens


@torch.no_grad()
def surprise(model, sequence, context):
    """Nats of each token after the first, one token at a time, seeing at most `context` tokens before it."""
    total = []
    for i in range(1, len(sequence)):
        logits = model(sequence[None, max(0, i - context) : i])[0, -1]
        total.append(-logits.double().log_softmax(-1)[sequence[i]].item())
    return total


def test_nll_is_the_surprise_of_each_next_token():
    model, sequences = tiny_model(), tokens(3, 9)
    expected = [surprise(model, row, 32) for row in sequences]
    torch.testing.assert_close(evaluate.nll(model, sequences), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@given(count=st.integers(1, 6), batch=st.integers(1, 7))
def test_perplexity_does_not_depend_on_the_batch(count, batch):
    model, sequences = tiny_model(), tokens(count, 7)
    nats = [nat for row in sequences for nat in surprise(model, row, 32)]
    assert evaluate.perplexity(model, sequences, batch) == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


@given(prompt=st.integers(1, 8), step=st.integers(1, 9))
def test_perplexity_through_a_cache_is_that_of_the_tokens_after_the_prompt(prompt, step):
    model, sequences = tiny_model(), tokens(3, 10)
    nats = [nat for row in sequences for nat in surprise(model, row, 32)[prompt:]]
    found = evaluate.cached_perplexity(model, sequences, KVCache(model.config, batch=3), prompt, step)
    assert found == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


@pytest.mark.parametrize(("prompt", "step"), [(0, 1), (9, 1), (3, 0)])
def test_a_prompt_that_leaves_nothing_to_score_is_refused(prompt, step):
    model = tiny_model()
    with pytest.raises(ValueError, match="need 1 <= prompt < 9 and step >= 1"):
        evaluate.cached_perplexity(model, tokens(1, 10), KVCache(model.config), prompt, step)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = tiny_model()
    model.embedding.weight.data.zero_()  # the head is tied to it: all logits are equal
    assert evaluate.perplexity(model, tokens(2, 8)) == pytest.approx(50, rel=1e-6)


@given(length=st.integers(0, 60), window=st.integers(2, 20), stride=st.integers(1, 19))
def test_windows_score_every_position_once_and_keep_their_context(length, window, stride):
    stride = min(stride, window - 1)
    spans = evaluate.windows(length, window, stride)
    assert [i for _, scored, end in spans for i in range(scored, end)] == list(range(1, length))
    for n, (start, scored, end) in enumerate(spans):
        assert 0 <= start < scored < end <= length and end - start <= window
        assert n == 0 or scored - start >= window - stride


def test_sliding_by_one_gives_every_token_all_the_context_there_is():
    model, sequence = tiny_model(), tokens(14)
    expected = sum(surprise(model, sequence, context=5))
    assert evaluate.text_nll(model, sequence, window=6, stride=1) == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_divide_by_the_bytes_of_the_text():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    model.embedding.weight.data.zero_()  # every token costs log2(280) bits
    texts = ["The dog 雪", "again"]
    count = sum(len(tokenizer.encode(text)) + 1 for text in texts)  # with the token that ends a document
    size = len("The dog ") + 3 + len("again")
    expected = count * math.log2(280) / size
    for window, stride in ((6, None), (6, 5), (33, 4)):
        assert evaluate.bits_per_byte(model, tokenizer, texts, window, stride) == pytest.approx(expected, rel=1e-6)


def test_more_context_cannot_be_mistaken_for_less():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    fixed = evaluate.bits_per_byte(model, tokenizer, [TEXT], window=16, stride=15)
    sliding = evaluate.bits_per_byte(model, tokenizer, [TEXT], window=16, stride=2)
    assert fixed != sliding


def test_nothing_to_score_is_refused():
    model = tiny_model()
    for shape in ((0, 5), (2, 1), (5,)):
        with pytest.raises(ValueError, match="tokens must be"):
            evaluate.nll(model, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="no text to score"):
        evaluate.bits_per_byte(model, tiny_tokenizer(), [], 16)
    for window, stride in ((34, 2), (1, 1), (16, 16), (16, 0)):
        with pytest.raises(ValueError, match="need 1 <= stride < window <= context"):
            evaluate.text_nll(model, tokens(20), window, stride)
