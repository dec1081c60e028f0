"""Sampling obeys the laws of its filters, and the decoding loop equals picking from the uncached pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitfm.cache import KVCache
from minitfm.generate import filtered_probabilities, generate, sample, stream
from tests.minitfm.models import tiny_model, tokens

LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12).map(torch.tensor)  # with ties
SHARES = st.floats(0.01, 1.0)


def kept(probabilities):
    return set(probabilities.nonzero().flatten().tolist())


@given(logits=LOGITS, temperature=st.floats(0.1, 5))
def test_without_filters_it_is_the_softmax(logits, temperature):
    expected = (logits.double() / temperature).softmax(-1).float()
    torch.testing.assert_close(filtered_probabilities(logits, temperature), expected)


@given(logits=LOGITS, k=st.integers(1, 14))
def test_top_k_keeps_the_k_likeliest_in_proportion(logits, k):
    full, found = logits.softmax(-1), filtered_probabilities(logits, top_k=k)
    left = kept(found)
    assert len(left) == min(k, len(logits))
    assert full[list(left)].min() >= max((full[i] for i in range(len(logits)) if i not in left), default=0)
    torch.testing.assert_close(found[list(left)], full[list(left)] / full[list(left)].sum())


@given(logits=LOGITS, p=SHARES)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    full, found = logits.double().softmax(-1), filtered_probabilities(logits, top_p=p)
    left = list(kept(found))
    mass, slack = full[left].sum().item(), 1e-6  # float32 sums may fall on either side of p
    assert mass >= p - slack
    assert mass - full[left].min().item() < p + slack, "a smaller set would have done"
    assert full[left].min() >= max((full[i] for i in range(len(logits)) if i not in left), default=0)
    torch.testing.assert_close(found[left], (full[left] / mass).float())


def test_top_p_on_a_hand_made_distribution():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    assert kept(filtered_probabilities(logits, top_p=0.5)) == {1}
    assert kept(filtered_probabilities(logits, top_p=0.51)) == {1, 2}
    assert kept(filtered_probabilities(logits, top_p=0.76)) == {1, 2, 3}
    torch.testing.assert_close(
        filtered_probabilities(logits, top_k=3, top_p=0.8), torch.tensor([0.0, 2 / 3, 1 / 3, 0.0])
    )  # of the three likeliest, 5/9 + 2.5/9 reach 0.8


@given(logits=LOGITS, k=st.integers(1, 14), p=SHARES, temperature=st.floats(0.1, 5))
def test_filtered_probabilities_are_a_distribution(logits, k, p, temperature):
    found = filtered_probabilities(torch.stack([logits, logits.flip(0)]), temperature, k, p)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2))


@given(logits=LOGITS, seed=st.integers(0, 999))
def test_samples_come_from_the_filtered_set(logits, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = sample(logits.repeat(20, 1), 1.5, top_k=3, top_p=0.9, generator=generator)
    assert set(drawn.tolist()) <= kept(filtered_probabilities(logits, 1.5, 3, 0.9))


def test_sampling_frequencies_follow_the_probabilities():
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    drawn = sample(logits.repeat(20_000, 1), 0.7, top_k=3, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(frequencies, filtered_probabilities(logits, 0.7, 3), rtol=0, atol=0.015)  # 4 sigma


def test_greedy_takes_the_first_of_equal_maxima():
    assert sample(torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "arguments", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_senseless_filters_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sample(torch.zeros(1, 4), **{"temperature": 1.0, **arguments})


@given(length=st.integers(1, 9), new=st.integers(0, 8))
def test_greedy_generation_equals_the_uncached_loop(length, new):
    model, sequence = tiny_model(), tokens(2, length)
    found = generate(model, sequence, new)
    for _ in range(new):
        with torch.no_grad():
            sequence = torch.cat([sequence, model(sequence)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, sequence)


def test_the_seed_decides_the_text():
    model, prompt = tiny_model(), tokens(1, 3)
    first, again, other = (generate(model, prompt, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_given_cache_is_used_and_must_be_empty():
    model, prompt = tiny_model(), tokens(1, 4)
    cache = KVCache(model.config)
    found = generate(model, prompt, 5, cache=cache)
    assert torch.equal(found, generate(model, prompt, 5))
    assert len(cache) == 8  # the last token was never fed back
    with pytest.raises(ValueError, match="must be empty, it holds 8 positions"):
        next(stream(model, prompt, 5, cache=cache))


@pytest.mark.parametrize(("length", "new"), [(0, 3), (4, -1), (30, 3)])
def test_text_that_does_not_fit_is_refused(length, new):
    with pytest.raises(ValueError, match="do not fit a context of 32"):
        next(stream(tiny_model(), tokens(1, length), new))
