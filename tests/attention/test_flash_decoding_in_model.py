"""Flash-Decoding in the model: its seam, the table of fastest products, what is counted, and the kernel's cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from chapters.attention import flash_decoding as decoding
from chapters.shared import decode_measures
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.model import Attend, Transformer, causal_attention
from tests.attention.checks import assert_close
from tests.attention.problems import problems
from tests.conftest import kernel, oracle

fast = kernel("attention.flash_decoding")
plain = oracle("attention.flash").attention


def tiny_model(attend: Attend) -> Transformer:
    """A small model of grouped heads, the same weights at each call."""
    torch.manual_seed(0)
    config = Config(vocab_size=32, dim=24, hidden_dim=32, layers=2, heads=4, kv_heads=2, context=40)
    return Transformer(config, attend).eval()


def test_the_table_holds_what_was_fastest():
    now, cost = [0.0], {"slow": lambda m: 5.0, "few": lambda m: 2.0 * m, "many": lambda m: 4.0}

    def way(name):
        def run(x, weight):
            if name == "few" and len(x) == 8:
                raise ValueError
            now[0] += cost[name](len(x))
            return x @ weight.T

        return run

    shapes = [(1, 3, 2), (4, 3, 2), (8, 3, 2)]
    table = decoding.dispatch_table(shapes, {name: way(name) for name in cost}, clock=lambda: now[0])
    assert list(table.values()) == ["few", "many", "many"] and list(table) == shapes
    with pytest.raises(ValueError, match="none of few serves"):
        decoding.dispatch_table([(8, 3, 2)], {"few": way("few")}, clock=lambda: now[0])


def test_all_ways_are_the_same_product():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    for way in decode_measures.linears().values():
        torch.testing.assert_close(way(x, weight), F.linear(x, weight))


@given(problems(), st.integers(1, 50) | st.none())
def test_attend_is_attention(problem, splits):
    q, k, v = (torch.from_numpy(x) for x in (problem.q, problem.k, problem.v))
    out = decoding.attend(q, k, v, splits)
    assert_close(out.numpy(), plain(problem.q, problem.k, problem.v)[0], problem)


def test_decoding_with_a_cache_gives_the_same_logits():
    plain_model, other = tiny_model(causal_attention), tiny_model(lambda q, k, v: decoding.attend(q, k, v, 3))
    tokens = torch.arange(12)[None] % plain_model.config.vocab_size
    cache = KVCache(other.config)
    with torch.no_grad():
        parts = [other(part, cache) for part in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:])]
        torch.testing.assert_close(torch.cat(parts, 1), plain_model(tokens), rtol=1e-4, atol=1e-5)


def test_half_precision_stays_half():
    x = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    assert decoding.attend(x, x, x, 2).dtype == torch.bfloat16


def test_occupancy_counts_waves():
    whole, cut = decoding.occupancy([1, 16, 17], 8192)
    assert whole == [8 / 132, 128 / 132, 136 / 264] and cut[1:] == whole[1:] and cut[0] > 0.8


def test_cases_count_what_must_move():
    for case in fast.CASES if fast else []:
        inputs = case.inputs(torch.device("cpu"))
        if len(inputs) == 3:
            q, k, v = inputs
            assert case.bytes == 2 * q.nbytes + k.nbytes + v.nbytes + 4 * q.shape[0] * q.shape[1]
        else:
            x, weight = inputs
            assert case.bytes == x.nbytes + weight.nbytes + 2 * len(x) * len(weight)


def test_chapter_and_kernel_agree_on_names():
    for name in ("flash_decoding", "combine", "flat_matmul") if fast else ():
        assert getattr(fast, name).__name__ == getattr(decoding, name).__name__
