"""The key-value cache: what goes in comes out, and nothing is stored that does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitfm.cache import KVCache
from tests.minitfm.models import tiny_config, tiny_model, tokens


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6), keep=st.integers(0, 24))
def test_it_returns_what_was_appended_and_forgets_what_is_truncated(sizes, keep):
    config = tiny_config()
    cache = KVCache(config, batch=2, capacity=24)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 2, 2, size, 4, generator=generator) for size in sizes]  # [k or v, B, Hkv, T, D]
    for part in parts:
        for layer in range(config.layers):
            k, v = cache.update(layer, part[0] + layer, part[1] + layer)
    held = torch.cat(parts, dim=3)
    assert torch.equal(k, held[0] + 1) and torch.equal(v, held[1] + 1)
    assert len(cache) == sum(sizes)
    keep = min(keep, len(cache))
    cache.truncate(keep)
    assert len(cache) == keep
    k, v = cache.update(0, parts[0][0], parts[0][1])
    assert torch.equal(k, torch.cat([held[0, :, :, :keep], parts[0][0]], dim=2))
    assert torch.equal(v, torch.cat([held[1, :, :, :keep], parts[0][1]], dim=2))


def test_decoding_after_truncation_equals_decoding_from_scratch():
    model, sequence = tiny_model(), tokens(1, 12)
    cache = KVCache(model.config)
    with torch.no_grad():
        model(tokens(1, 9, seed=5), cache)
        cache.truncate(0)
        model(sequence[:, :10], cache)
        cache.truncate(7)
        torch.testing.assert_close(model(sequence[:, 7:], cache), model(sequence)[:, 7:])


def test_overflow_is_refused_and_stores_nothing():
    cache = KVCache(tiny_config(), capacity=5)
    three = torch.ones(1, 2, 3, 4)
    for layer in range(2):
        cache.update(layer, three, three)
    with pytest.raises(ValueError, match="cache is full: 3 positions held, 3 new, capacity 5"):
        cache.update(0, three, three)
    assert cache.lengths == [3, 3]
    k, _ = cache.update(0, 2 * three[:, :, :2], three[:, :, :2])
    assert k[0, 0, :, 0].tolist() == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("shape", [(2, 2, 1, 4), (1, 3, 1, 4), (1, 2, 1, 5)])
def test_a_shape_of_another_model_is_refused(shape):
    cache = KVCache(tiny_config())
    with pytest.raises(ValueError, match=r"cache holds \[batch=1, kv_heads=2, T, head_dim=4\]"):
        cache.update(0, torch.ones(shape), torch.ones(shape))
    with pytest.raises(ValueError, match="cache holds"):
        cache.update(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 2, 4))
    assert cache.lengths == [0, 0]


@pytest.mark.parametrize("length", [-1, 4])
def test_truncation_only_shortens(length):
    cache = KVCache(tiny_config())
    for layer in range(2):
        cache.update(layer, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    with pytest.raises(ValueError, match=f"cannot truncate to {length}: cache holds 3 positions"):
        cache.truncate(length)
    assert len(cache) == 3


def test_it_counts_the_bytes_of_what_it_holds():
    config = tiny_config()
    cache = KVCache(config, batch=3, dtype=torch.float16)
    for layer in range(2):
        cache.update(layer, torch.ones(3, 2, 5, 4), torch.ones(3, 2, 5, 4))
    assert cache.nbytes() == 5 * 2 * config.layers * 3 * config.kv_heads * config.head_dim * 2


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"capacity": 0}])
def test_an_empty_cache_is_refused(sizes):
    with pytest.raises(ValueError, match="batch and capacity must be positive"):
        KVCache(tiny_config(), **sizes)
