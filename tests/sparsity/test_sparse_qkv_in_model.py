"""Sparse QKV in the model: the modules against the reference, decoding with a state, its cache, the counts."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

from chapters.lab import Lab
from chapters.shared.conv_cache import ConvCache, start
from chapters.sparsity import sparse_qkv as chapter
from minitfm import surgery
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.generate import generate
from minitfm.model import Transformer
from tests.conftest import tolerance

CONFIG = Config(vocab_size=13, dim=16, hidden_dim=8, layers=2, heads=4, context=24)


def small(modules: int = 4, taps: int = 3) -> Transformer:
    torch.manual_seed(0)
    return chapter.sparsify(Transformer(CONFIG), modules, taps).eval()


def text(T: int = 17, B: int = 2) -> torch.Tensor:
    return torch.randint(13, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("begins", [True, False])
def test_the_module_is_the_reference(taps, begins):
    torch.manual_seed(0)
    layer = chapter.SparseQKV(6, 3, 4, taps).double()
    x, past = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, taps - 1, 12, dtype=torch.float64)
    found = layer(x, None if begins else past)
    weights = [weight.detach().numpy() for weight in layer.parameters()]
    expected = chapter.sparse_qkv(x.numpy(), *weights, None if begins else past.numpy())
    for one, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.detach().numpy(), exact, **tolerance(np.float64, 36))
    assert sum(weight.size for weight in weights) == chapter.qkv_weights(6, 3, 4, taps)
    torch.stack([y.square().sum() for y in found[:3]]).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in layer.parameters())


@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("cuts", [[17], [1] * 17, [2, 1, 7, 1, 1, 5]])
@torch.no_grad()
def test_decoding_gives_the_logits_of_the_whole_text_however_it_is_cut(taps, cuts):
    model, tokens = small(taps=taps), text()
    cache = start(model, batch=2)
    parts = [model(part, cache) for part in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), **tolerance(torch.float32, 16))
    assert len(cache) == 17
    assert all(state is not None and state.untyped_storage().nbytes() == state.nbytes for state in cache.states)


@torch.no_grad()
def test_without_the_state_a_step_would_be_wrong():
    model, tokens = small(), text()
    cache = start(model, batch=2)
    model(tokens[:, :-1], cache)
    cache.states = [None, None]
    assert (model(tokens[:, -1:], cache) - model(tokens)[:, -1:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_without_a_place_for_the_state_is_refused():
    with pytest.raises(TypeError, match="ConvCache"):
        small()(text(), KVCache(CONFIG, batch=2))


@torch.no_grad()
def test_a_cache_forgets_all_or_nothing_and_can_begin_anew():
    model, tokens = small(), text()
    cache = start(model, batch=2)
    first = model(tokens, cache)
    cache.truncate(17)
    with pytest.raises(ValueError, match="truncate to 16"):
        cache.truncate(16)
    cache.truncate(0)
    assert len(cache) == 0
    torch.testing.assert_close(model(tokens, cache), first)


@torch.no_grad()
def test_a_full_cache_is_refused_before_the_state_moves():
    model, tokens = small(), text()
    cache = start(model, batch=2, capacity=16)
    model(tokens[:, :16], cache)
    before = list(cache.states)
    with pytest.raises(ValueError, match="full"):
        model(tokens[:, 16:], cache)
    assert all(one is other for one, other in zip(before, cache.states, strict=True))


def test_a_past_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="past must be"):
        chapter.SparseQKV(4, 2, 2)(torch.randn(2, 3, 4), torch.randn(1, 2, 4))


def test_it_generates():
    model, prompt = small(), text(5, 1)
    written = generate(model, prompt, 8, cache=start(model))
    logits = model(written[:, :-1])
    assert torch.equal(logits[:, 4:].argmax(-1), written[:, 5:])


def test_only_q_k_and_v_are_replaced_and_unfit_sizes_are_refused():
    assert all(not name.endswith(("q_proj", "k_proj", "v_proj")) for name in surgery.linears(small()))
    with pytest.raises(ValueError, match="divide the 16 outputs, got 3"):
        chapter.sparsify(Transformer(CONFIG), 3)
    with pytest.raises(ValueError, match="one width, got 16 and 8"):
        chapter.sparsify(Transformer(replace(CONFIG, kv_heads=2)), 4)


def test_low_rank_has_at_least_as_many_weights_and_hardly_more():
    config = chapter.sized(replace(CONFIG, dim=128, heads=4, head_dim=32))
    assert (config.heads, config.head_dim) == (8, 16)
    counts = {name: chapter.projection_weights(chapter.variant(name, config, 8, 0))
              for name in (chapter.DENSE, chapter.SPARSE, chapter.LOW_RANK)}  # fmt: skip
    assert counts[chapter.DENSE] == 3 * 128**2 and counts[chapter.SPARSE] == chapter.qkv_weights(128, 8, 16)
    assert 0 <= counts[chapter.LOW_RANK] - counts[chapter.SPARSE] < 6 * 128


def test_counts_of_llama_7b_are_those_that_the_chapter_states():
    weights, operations = chapter.qkv_weights(4096, 32, 128), chapter.qkv_operations(4096, 32, 128)
    assert 0.99e6 < weights < 1.01e6 and 0.54 < operations / (6 * 4096**2) < 0.56


def test_run_shows_both_models_and_refuses_bad_options():
    lab = Lab()
    args = argparse.Namespace(modules=None, steps=1, seed=0)
    found = chapter.demonstrate(lab, args)
    assert found["largest difference of a logit in decoding"] < 1e-3 and found["goes on with"]
    with pytest.raises(ValueError, match="modules"):
        chapter.demonstrate(lab, argparse.Namespace(modules=3, steps=1, seed=0))


def test_a_wrapped_cache_is_asked_for_its_length():
    inner = KVCache(CONFIG)
    assert len(ConvCache(inner, 2)) == len(inner) == 0
