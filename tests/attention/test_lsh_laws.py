"""What LSH attention obeys: hashes, rounds and repeats; and errors in words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chapters.attention import lsh
from tests.attention.lsh_problems import CHUNKS, PROBLEMS, make, met
from tests.conftest import golden

GOLDEN = golden("attn/lsh_reformer")


def test_close_vectors_share_buckets_more_often():
    rotations = np.random.default_rng(0).normal(size=(8, 4000, 4))
    angles, rates = (0.1, 0.5, 1.0, 2.0, np.pi), []
    for angle in angles:
        pair = np.zeros((2, 8))
        pair[0, 0], pair[1, 0], pair[1, 1] = 1, np.cos(angle), np.sin(angle)
        first, second = lsh.hash_buckets(pair, rotations).T
        rates.append(np.mean(first == second))
    assert rates[0] > 0.85 and all(np.diff(rates) < -0.02) and rates[-1] == 0


@given(PROBLEMS, CHUNKS, st.booleans(), st.booleans())
def test_times_seen_counts_every_meeting(problem, chunk, causal, across):
    seen = lsh.times_seen(problem.buckets, chunk, causal, across)
    for h in range(2):
        expected = np.zeros_like(seen[0, h])
        for (_, i), keys in met(problem.buckets[0, h], chunk, causal, across).items():
            np.add.at(expected[i], keys, 1)
        np.testing.assert_array_equal(seen[0, h], expected)


@given(PROBLEMS, CHUNKS)
def test_more_rounds_find_more(problem, chunk):
    seen = [
        lsh.times_seen(problem.buckets[:, :, : r + 1], chunk, across=False) for r in range(problem.buckets.shape[2])
    ]
    assert (np.diff(seen, axis=0) >= 0).all() and (np.diagonal(seen[0], axis1=-2, axis2=-1) >= 1).all()


def test_later_tokens_help_to_choose_the_keys_of_earlier_ones():
    problem = make("normal", 0, 24, 4, 1)
    buckets = problem.buckets.copy()
    buckets[..., -4:] = 0  # sorted before most others: chunks shift
    before, after = (lsh.lsh_attention(problem.qk, problem.v, b, 4)[0] for b in (problem.buckets, buckets))
    assert np.abs(before - after)[:, :, :20].max() > 0.1


def test_operations_count_all_pairs_of_two_chunks():
    problem = make("normal", 0, 32, 8, 3)
    pairs = sum(mask[0, 0].size for *_, mask in lsh.chunk_pairs(problem.buckets, 4))
    assert lsh.lsh_operations(32, 8, 4, 3, 8) == 4 * 8 * pairs + 3 * 32 * 8 * 8
    assert lsh.exact_operations(32, 8) == 4 * 8 * np.tri(32).sum()


def test_the_released_count_of_repeats_differs_only_by_meetings_across_rounds():
    qk, v, buckets = (GOLDEN[f"causal_dedup/{name}"] for name in ("qk", "v", "buckets"))
    buckets = buckets.reshape(1, 3, 32) - 4 * np.arange(3)[:, None]
    place = np.argsort(np.argsort(buckets, axis=-1, kind="stable"), axis=-1)[0] // 8
    step = place[:, :, None] - place[:, None, :]
    counted = np.logical_or(step == 0, step == 1).sum(0)  # their count: within each round, without the look back
    everyone = np.arange(32)[None]
    scores = lsh.shared_scores(qk.astype(np.float64), everyone, everyone, 6**-0.5)
    weights = np.exp(scores) * np.tril(lsh.times_seen(buckets, 8)) / (counted + 1e-9)
    np.fill_diagonal(weights[0], 1e-30)
    out = weights @ v / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, GOLDEN["causal_dedup/out"], atol=1e-8)


def test_errors_say_what_is_allowed():
    qk, buckets = np.ones((5, 3)), np.zeros((1, 5), int)
    with pytest.raises(ValueError, match=r"buckets must be \[..., R, T\] to fit qk \(5, 3\), got \(1, 4\)"):
        lsh.lsh_attention(qk, qk, buckets[:, :4])
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        lsh.times_seen(buckets, 0)
    with pytest.raises(TypeError, match="buckets must be integers, got float64"):
        lsh.times_seen(buckets / 2, 2)
