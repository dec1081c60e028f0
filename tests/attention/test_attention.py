"""What FlashAttention computes, `attention`, against a loop, torch and laws; and the bytes that it counts."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.attention import flash
from tests.attention.checks import assert_close
from tests.attention.problems import BLOCKS, problems, torch_attention
from tests.conftest import tolerance


@given(problems(lengths=st.integers(1, 6), head_sizes=st.integers(1, 5)))
def test_attention_is_a_weighted_mean_of_the_visible_values(problem):
    out, lse = flash.attention(problem.q, problem.k, problem.v, **problem.options())
    (B, H, T, D), (_, kv_heads, S, _) = problem.q.shape, problem.k.shape
    scale = D**-0.5 if problem.scale is None else problem.scale
    means, logs = np.zeros_like(out), np.zeros_like(lse)
    for b, h, i in np.ndindex(B, H, T):
        keys, values = problem.k[b, h * kv_heads // H], problem.v[b, h * kv_heads // H]
        visible = [j for j in range(S) if not problem.causal or j <= i + S - T]
        scores = [scale * math.fsum(problem.q[b, h, i] * keys[j]) for j in visible]
        weights = [math.exp(score - max(scores)) for score in scores]
        total = math.fsum(weights)
        for d in range(D):
            weighted = math.fsum(w * values[j, d] for w, j in zip(weights, visible, strict=True))
            means[b, h, i, d] = weighted / (total or 1)
        logs[b, h, i] = max(scores) + math.log(total) if visible else -np.inf
    allowed = tolerance(np.float64, S * H, scale=max(1.0, problem.largest_score))
    np.testing.assert_allclose(out, means, **allowed)
    np.testing.assert_allclose(lse, logs, **allowed)


@given(problems())
def test_attention_is_torch_s(problem):
    q, k, v = (torch.from_numpy(x) for x in (problem.q, problem.k, problem.v))
    expected = torch_attention(q, k, v, problem.causal, problem.scale).nan_to_num(0)
    assert_close(flash.attention(problem.q, problem.k, problem.v, **problem.options())[0], expected, problem)


@given(problems(kinds=("normal", "outlier channel")), st.data())
def test_laws_of_attention(problem, data):
    """Neither the order of keys matters nor a shift of all scores; weights sum to one; parts merge by their lse."""

    def attend(k, v):
        return flash.attention(problem.q, k, v, False, problem.scale)

    k, v = problem.k, problem.v
    out, lse = attend(k, v)
    order = np.random.default_rng(0).permutation(k.shape[2])
    assert_close(attend(k[:, :, order], v[:, :, order])[0], out, problem)
    assert_close(attend(k + k[:1, :1, :1], v)[0], out, problem)
    assert_close(attend(k, np.ones_like(v))[0], np.ones_like(out), problem)
    cut = data.draw(st.integers(0, k.shape[2] - 1))
    parts = [attend(k[:, :, part], v[:, :, part]) for part in (slice(cut), slice(cut, None)) if k[:, :, part].size]
    merged = np.logaddexp.reduce([part[1] for part in parts])
    assert_close(merged, lse, problem)
    assert_close(sum(np.exp(part[1] - merged)[..., None] * part[0] for part in parts), out, problem)


@given(problems(), BLOCKS)
def test_bytes_count_the_keys_that_a_tile_of_queries_sees(problem, block_q):
    (B, H, T, D), S = problem.q.shape, problem.k.shape[2]
    sees = np.tril(np.ones((T, S), bool), S - T) if problem.causal else np.ones((T, S), bool)
    keys_read = sum(sees[i : i + block_q].any(axis=0).sum() for i in range(0, T, block_q))
    counted = flash.hbm_bytes_flash(problem.q.shape, problem.k.shape, block_q, problem.causal, itemsize=8)
    assert counted == 2 * problem.q.nbytes + B * H * (keys_read * 2 * D * 8 + 4 * T)
    once = 2 * problem.q.nbytes + problem.k.nbytes + problem.v.nbytes
    assert flash.hbm_bytes_naive(problem.q.shape, problem.k.shape, itemsize=8) == once + 4 * B * H * T * S * 8
