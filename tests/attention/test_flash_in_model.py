"""FlashAttention in the model: same logits and gradients, cached decoding, and memory that grows like the length."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from hypothesis import given

from chapters.attention import flash
from chapters.shared.memory import peak_bytes
from chapters.shared.naive_attention import naive_attend
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.model import Transformer
from tests.attention.checks import assert_close
from tests.attention.problems import problems
from tests.conftest import DEVICE, kernel, oracle, tolerance

book, fast = oracle("attention.flash"), kernel("attention.flash")


def models(**config) -> tuple[Transformer, Transformer]:
    """The same random weights with torch's attention and with ours."""
    shape = Config(vocab_size=32, dim=48, hidden_dim=32, layers=2, heads=6, context=200, **config)
    plain, ours = Transformer(shape), Transformer(shape, attend=flash.attend)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@given(problems())
def test_attend_is_the_reference_and_so_is_its_gradient(problem):
    arrays = (problem.q, problem.k, problem.v)
    tensors = [torch.from_numpy(x).requires_grad_() for x in arrays]
    out = flash.attend(*tensors)
    forward = book.attention(*arrays)
    assert_close(out.detach(), forward[0], problem)
    gradients = torch.autograd.grad(out, tensors, torch.from_numpy(problem.dout))
    for gradient, truth in zip(gradients, book.flash_attention_backward(problem.dout, *arrays, *forward), strict=True):
        assert_close(gradient, truth, problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attend_sums_in_float32_and_returns_its_dtype(dtype):
    x = torch.randn(1, 2, 150, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = flash.attend(x, x, x)
    assert out.dtype == dtype
    expected = book.attention(*[x.double().numpy()] * 3)[0]
    once = torch.finfo(dtype).eps  # rounded to the dtype at the end only
    np.testing.assert_allclose(out.double(), expected, rtol=once, atol=tolerance(torch.float32)["atol"])


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_the_model_gives_the_same_logits_and_gradients(kv_heads):
    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (2, 130))
    results = []
    for model in models(kv_heads=kv_heads):
        logits = model.double()(tokens)
        gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))
        results.append((logits.detach(), *gradients))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, **tolerance(torch.float64, 130, scale=130))


def test_cached_decoding_meets_all_keys():
    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (2, 70))
    _, ours = models(kv_heads=2)
    with torch.no_grad():
        whole = ours(tokens)
        cache = KVCache(ours.config, batch=2)
        parts = [ours(part, cache) for part in tokens.split([66, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **tolerance(torch.float32, 70))


def trained_bytes(attend, length: int) -> int:
    q, k, v = (torch.ones(1, 2, length, 8, requires_grad=True) for _ in range(3))
    return peak_bytes(lambda: torch.autograd.grad(attend(q, k, v).sum(), (q, k, v)))


def test_every_token_costs_the_same_memory_and_naively_more_and_more():
    lengths = [2 * flash.TILE, 3 * flash.TILE, 4 * flash.TILE]
    flashes, naives = ([trained_bytes(way, n) for n in lengths] for way in (flash.attend, naive_attend))
    assert flashes[2] - flashes[1] == flashes[1] - flashes[0]
    assert naives[2] - naives[1] > 1.3 * (naives[1] - naives[0])  # (16 - 9) / (9 - 4) of the squares
    assert naives[0] > 2 * lengths[0] ** 2 * 4


def test_a_gradient_of_the_gradient_is_refused():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(flash.attend(x, x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_attend_refuses_integers():
    with pytest.raises(TypeError, match=r"torch\.int64"):
        flash.attend(*[torch.zeros(1, 1, 2, 2, dtype=torch.int64)] * 3)


def test_the_model_runs_with_the_chapter_s_seams():
    assert flash.seams(types.SimpleNamespace()) == {"attend": flash.attend}


@pytest.mark.kernel
def test_kernel_under_autograd_with_the_tiles_that_it_picks_itself():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 19, 16, generator=generator).to(DEVICE).requires_grad_() for heads in (2, 1, 1))
    out, lse = fast.flash_attention(q, k, v)
    assert not lse.requires_grad
    gradients = torch.autograd.grad(out.sum(), (q, k, v))  # its gradient is one number, expanded: strides of zero
    expected = fast.flash_attention_backward(torch.ones_like(q), q.detach(), k.detach(), v.detach(), out.detach(), lse)
    for gradient, truth in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=0, atol=0)
