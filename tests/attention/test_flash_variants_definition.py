"""What FlashAttention's variants compute, `attention`, against a loop and laws; their tiles, and the bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import flash, flash_variants
from chapters.shared.visible_tiles import distances, query_tiles, reach, spans
from tests.attention.checks import assert_close
from tests.attention.problems import BLOCKS, make, problems
from tests.attention.variants import GOLDEN, Variant, distance, variants
from tests.conftest import golden, tolerance

few = settings(max_examples=20)


@few
@given(variants(lengths=st.integers(1, 6), head_sizes=st.integers(1, 5)))
def test_attention_is_a_weighted_mean_of_the_visible_values(variant):
    problem, (ahead, seen) = variant.problem, distance(variant)
    (q, k, v), (B, H, T, D) = variant.arrays, problem.q.shape
    out, lse = flash_variants.attention(q, k, v, **variant.options())
    scale = D**-0.5 if problem.scale is None else problem.scale
    for b, h, i in np.ndindex(B, H, T):
        head, scores = h * k.shape[1] // H, []
        visible = np.flatnonzero(seen[i])
        for j in visible:
            x = scale * math.fsum(q[b, h, i] * k[b, head, j])
            x = x if variant.softcap is None else variant.softcap * math.tanh(x / variant.softcap)
            scores.append(x if variant.slopes is None else x - variant.slopes[h] * abs(int(ahead[i, j])))
        weights = [math.exp(x - max(scores)) for x in scores]
        mean = sum(w * v[b, head, j] for w, j in zip(weights, visible, strict=True)) / (math.fsum(weights) or 1)
        log = max(scores) + math.log(math.fsum(weights)) if scores else -math.inf
        allowed = tolerance(np.float64, T * H, scale=max(1.0, problem.largest_score))
        np.testing.assert_allclose(out[b, h, i], mean, **allowed)
        np.testing.assert_allclose(lse[b, h, i], log, **allowed)


@few
@given(problems())
def test_without_options_it_is_flash(problem):
    arrays = (problem.q, problem.k, problem.v)
    for found, truth in zip(
        flash_variants.attention(*arrays, **problem.options()),
        flash.attention(*arrays, **problem.options()),
        strict=True,
    ):
        np.testing.assert_array_equal(found, truth)


@few
@given(variants(kinds=("normal",)))
def test_packed_sequences_are_as_each_by_itself(variant):
    q, k, v = variant.arrays
    options = variant.options()
    out, lse = flash_variants.attention(q, k, v, **options)
    alone = options | {"cu_q": None, "cu_k": None}
    for own, seen in spans(q.shape[2], k.shape[2], variant.cu_q, variant.cu_k):
        if own.stop > own.start and seen.stop > seen.start:
            expected = flash_variants.attention(q[:, :, own], k[:, :, seen], v[:, :, seen], **alone)
            assert_close(out[:, :, own], expected[0], variant.problem)
            assert_close(lse[:, :, own], expected[1], variant.problem)
        else:
            assert not out[:, :, own].any() and np.isneginf(lse[:, :, own]).all()


def test_laws():
    problem = make("normal", 0, (1, 2, 2), T=13, S=17, D=8, causal=True, scale=None)
    arrays, attention = (problem.q, problem.k, problem.v), flash_variants.attention
    plain = attention(*arrays)
    for options in ({"window": (17, 0)}, {"slopes": np.zeros(4)}, {"softcap": 1e9}, {"cu_q": [0, 13], "cu_k": [0, 17]}):
        for found, truth in zip(attention(*arrays, **options), plain, strict=True):
            np.testing.assert_allclose(found, truth, atol=1e-9, err_msg=str(options))
    out, lse = attention(*arrays, window=(0, 0))  # each query sees one key, its own place
    np.testing.assert_allclose(out, problem.v[:, :, 4:].repeat(2, axis=1), atol=1e-12)
    np.testing.assert_allclose(lse, (problem.q * problem.k[:, :, 4:].repeat(2, axis=1)).sum(-1) / 8**0.5, atol=1e-12)


def test_slopes_on_columns_change_the_lse_alone():
    """flash-attn adds slope * j under a causal mask; docstring: its lse is larger by slope * p."""
    problem = make("normal", 1, (1, 1, 2), T=5, S=9, D=8, causal=True, scale=None)
    slopes, p = np.array([0.5, 0.1]), np.arange(5) + 4
    out, lse = flash_variants.attention(problem.q, problem.k, problem.v, slopes=slopes)
    scores = problem.q @ problem.k.swapaxes(-1, -2) / 8**0.5 + slopes[:, None, None] * np.arange(9)
    scores = np.where(np.arange(9) <= p[:, None], scores, -np.inf)
    total = np.logaddexp.reduce(scores, axis=-1)
    np.testing.assert_allclose(np.exp(scores - total[..., None]) @ problem.v, out, atol=1e-12)
    np.testing.assert_allclose(total, lse + slopes[:, None] * p, atol=1e-12)


def test_slopes_are_the_authors():
    halves = 2.0 ** -np.arange(1, 9)
    np.testing.assert_array_equal(flash_variants.alibi_slopes(8), halves)
    np.testing.assert_allclose(flash_variants.alibi_slopes(16)[::2], 2.0**-0.5 * 2.0 ** -np.arange(8), rtol=1e-15)
    np.testing.assert_allclose(flash_variants.alibi_slopes(12), [*halves, *(2.0 ** -np.arange(0.5, 4))], rtol=1e-15)
    np.testing.assert_allclose(flash_variants.alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    assert flash_variants.alibi_slopes(1) == [2.0**-8]
    with pytest.raises(ValueError, match="heads must be"):
        flash_variants.alibi_slopes(0)


@pytest.mark.parametrize(("case", "options"), [case for case in GOLDEN if case[0].startswith(("window", "alibi_c"))])
def test_masks_are_the_original_code_s(case, options):
    hidden = golden("attn/flash_attention_variants")[f"{case}/hidden_mask"]
    ahead = distances(slice(0, len(hidden)), slice(0, hidden.shape[1]), hidden.shape[1] - len(hidden))
    left, right = reach(options.get("causal", True), options.get("window", (None, None)))
    np.testing.assert_array_equal(hidden, ~((-left <= ahead) & (ahead <= right)))


@given(variants(head_sizes=st.just(1)), BLOCKS)
def test_tiles_hold_every_visible_pair_and_bytes_count_their_keys(variant: Variant, block_q):
    (_, seen), (q, k, _) = distance(variant), variant.arrays
    T, S, options = q.shape[2], k.shape[2], variant.options()
    covered, keys_read = np.zeros_like(seen), 0
    sequences = spans(T, S, variant.cu_q, variant.cu_k)
    for rows, run, _ in query_tiles(sequences, *reach(options["causal"], variant.window), block_q):
        some = np.flatnonzero(seen[rows].any(axis=0))
        covered[rows, run.start : max(run.stop, run.start)] = True
        keys_read += len(some)
        assert [run.start, run.stop - 1] == [some[0], some[-1]] if len(some) else run.stop <= run.start
    assert not (seen & ~covered).any()
    names = ("causal", "window", "cu_q", "cu_k")
    counted = flash_variants.hbm_bytes(q.shape, k.shape, block_q, **{n: options[n] for n in names}, itemsize=8)
    assert counted == 2 * q.nbytes + q.shape[0] * q.shape[1] * (keys_read * 2 * q.shape[3] * 8 + 4 * T)


def test_tiles_follow_the_window_and_not_the_text():
    def visited(T: int, window: int | None) -> int:
        left, right = reach(True, (window, None))
        found = query_tiles(spans(T, T), left, right, 64)
        return sum(-(-(seen.stop - seen.start) // 64) for _, seen, _ in found)

    assert visited(4096, None) == 64 * 65 // 2
    assert visited(4096, 128) <= 64 * 3 and visited(8192, 128) - visited(4096, 128) == 64 * 3
