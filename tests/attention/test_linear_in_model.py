"""Linear attention in the model: torch against the reference, gradients, decoding from a state, the counts."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch

from chapters.attention import linear
from chapters.shared import feature_attention
from chapters.shared.feature_attention import StateCache, attend_features, crossing
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.model import Transformer
from tests.attention.linear_problems import make, wrong_input
from tests.conftest import DEVICE, kernel, tolerance

fast = kernel("attention.linear")


def model(attend, kv_heads: int = 4) -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(32, dim=32, hidden_dim=32, layers=2, heads=4, kv_heads=kv_heads, context=64), attend)


def drawn(T: int, S: int, heads: int = 2, kv_heads: int = 2, D: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, T, D), (1, kv_heads, S, D), (1, kv_heads, S, D))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize(("T", "S"), [(70, 70), (5, 9), (1, 3), (1, 1)])
@pytest.mark.parametrize("kind", feature_attention.FEATURES)
def test_torch_is_the_reference(kind, T, S):
    q, k, v = drawn(T, S)
    found = linear.make_attend(kind, 32, seed=3, eps=1e-4)(q, k, v)
    w = linear.orthogonal_projection(16 if kind == "rfa" else 32, 6, 3)
    maps = {
        "elu": lambda x, query: linear.elu_features(x),
        "favor": lambda x, query: linear.favor_features(x, w, query),
        "rfa": lambda x, query: linear.rfa_features(x, w),
    }
    features = [maps[kind](x.numpy(), query) for x, query in ((q, True), (k, False))]
    expected = linear.linear_attention(*features, v.numpy(), eps=0.0 if kind == "favor" else linear.EPS)[0]
    np.testing.assert_allclose(found, expected, **tolerance(torch.float64, 70, scale=10))


def test_grouped_heads_read_the_key_head_they_share():
    q, k, v = drawn(7, 7, heads=4)
    attend = linear.make_attend()
    repeated = attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(attend(q, k, v), repeated, rtol=0, atol=0)


def test_gradients_are_the_reference_s():
    problem = make("normal", 0, 21, 3, 5)
    tensors = [torch.from_numpy(x).requires_grad_() for x in problem.arrays()]
    out, _ = attend_features(*tensors, chunk=8)
    found = torch.autograd.grad(out, tensors, torch.from_numpy(problem.dout))
    forward = linear.chunked_attention(*problem.arrays())
    for gradient, truth in zip(
        found, linear.chunked_attention_backward(problem.dout, *problem.arrays(), *forward), strict=True
    ):
        np.testing.assert_allclose(gradient, truth, **tolerance(torch.float64, 21, scale=10))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["elu", "rfa"])
def test_decoding_from_a_state_is_the_whole_pass(kind, kv_heads):
    cache = StateCache(linear.make_attend(kind, 64))
    network, tokens = model(cache.attend, kv_heads), torch.randint(0, 32, (2, 20))
    with torch.no_grad():
        whole = network(tokens)
        for _ in range(2):
            parts = [network(part, cache) for part in tokens.split([13, 1, 1, 5], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-4)
            assert len(cache) == 20
            cache.truncate(0)


def test_the_state_stays_and_the_cache_grows():
    cache = StateCache(linear.make_attend())
    network, sizes = model(cache.attend), []
    with torch.no_grad():
        for _ in range(3):
            network(torch.zeros(1, 5, dtype=torch.long), cache)
            sizes.append(cache.nbytes())
    assert sizes == [2 * 4 * linear.state_bytes(8, 8)] * 3
    plain = KVCache(network.config)
    plain.lengths = [15, 15]
    assert plain.nbytes() == 2 * 4 * linear.cache_bytes(15, 8)


def test_a_state_cannot_forget_some_nor_hold_favor():
    cache = StateCache(linear.make_attend())
    model(cache.attend)(torch.zeros(1, 5, dtype=torch.long), cache)
    cache.truncate(5)
    with pytest.raises(ValueError, match="truncate to 3"):
        cache.truncate(3)
    with pytest.raises(ValueError, match="favor"):
        StateCache(linear.make_attend("favor"))


@pytest.mark.parametrize("chunk", [1, 16])
def test_the_crossover_is_where_the_counts_cross(chunk):
    for features, D in ((8, 8), (64, 16), (3, 1)):
        at = linear.crossover(features, D, chunk)
        less = [linear.linear_operations(n, features, D, chunk) < linear.softmax_operations(n, D) for n in (at - 1, at)]
        assert less == [False, True]


def test_crossing_reads_between_the_points():
    assert crossing([1, 2, 4], [2.0, 2.0, 2.0], [1.0, 1.0, 4.0]) == pytest.approx(2 * math.sqrt(2))
    assert crossing([1, 2], [1.0, 1.0], [2.0, 3.0]) == 1
    assert crossing([1, 2], [1.0, 1.0], [2.0, 1.0]) is None


def test_options_and_what_they_refuse():
    parser = argparse.ArgumentParser()
    linear.options(parser)
    args = parser.parse_args(["--features", "rfa", "--count", "6"])
    args.seed = 0
    assert linear.seams(args)["attend"].count == 6
    for kind, count, words in (("rfa", 5, "even"), ("favor", 0, "at least 1"), ("relu", 4, "features must be")):
        with pytest.raises(ValueError, match=words):
            linear.make_attend(kind, count)


@pytest.mark.parametrize(("arrays", "options", "error"), wrong_input())
def test_parallel_refuses_in_words(arrays, options, error):
    with pytest.raises(error, match=r"need q|axes|eps|dtype|more queries"):
        linear.linear_attention(*arrays, **options)


@pytest.mark.kernel
def test_kernel_under_autograd():
    problem = make("normal", 1, 19, 16, 16)
    tensors = [torch.from_numpy(x).float().to(DEVICE).requires_grad_() for x in problem.arrays()]
    out, total = fast.chunked_attention(*tensors)
    assert not total.requires_grad
    found = torch.autograd.grad(out.sum(), tensors)  # an expanded gradient
    expected = fast.chunked_attention_backward(
        torch.ones_like(out), *(x.detach() for x in tensors), out.detach(), total
    )
    for gradient, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=0, atol=0)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "options", "words"),
    [
        ({"k": (1, 2, 5, 8)}, {}, "k must have q's shape"),
        ({"v": (1, 2, 4, 16)}, {}, "v must be"),
        ({"q": (2, 5, 16)}, {}, "q must be 4-D"),
        ({"v": (1, 2, 5, 200)}, {}, "at most 128"),
        ({}, {"chunk": 24}, "chunk must be"),
        ({}, {"eps": -1.0}, "eps must be"),
    ],
)
def test_kernel_refuses(changed, options, words):
    shapes = {"q": (1, 2, 5, 16), "k": (1, 2, 5, 16), "v": (1, 2, 5, 16)} | changed
    with pytest.raises(ValueError, match=words):
        fast.chunked_attention(*(torch.zeros(shape, device=DEVICE) for shape in shapes.values()), **options)


@pytest.mark.kernel
def test_kernel_refuses_dtypes_and_totals():
    q = torch.zeros(1, 1, 4, 16, device=DEVICE)
    with pytest.raises(TypeError, match="k must have dtype"):
        fast.chunked_attention(q, q.half(), q)
    with pytest.raises(ValueError, match="total must be"):
        fast.chunked_attention_backward(q, q, q, q, q, q[:, :, :3, 0])
    with pytest.raises(ValueError, match="dout must"):
        fast.chunked_attention_backward(q[:, :, :3], q, q, q, q, q[..., 0].contiguous())
