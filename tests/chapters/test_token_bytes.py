"""Bytes that one decoded token reads: by hand for a small model, and against the models and caches that there are."""

import dataclasses

import pytest
import torch

from chapters import contents
from chapters.token_bytes import Reads, block_weights, reads
from minitfm import surgery
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.model import Transformer

SMALL = Config(vocab_size=10, dim=4, hidden_dim=6, layers=2, heads=2, kv_heads=1, head_dim=2)


def test_a_small_model_by_hand():
    # a block: queries 4·4, keys 4·2, values 4·2, outputs 4·4, feed-forward 3·4·6 = 120 weights, in 4 bits 60 bytes
    # rest: head 10·4, row 4, norms 5·4 = 64 numbers; cache: 2 layers · (2 keys + 2 values) · 3 tokens = 24 numbers
    found = reads(SMALL, bits=4, context=3)
    assert found == Reads(weights=120.0, rest=128, cache=48)
    assert found.total == 296


def test_layers_that_are_left_out_have_no_norms_and_no_cache():
    # bits are counted over all 240 weights of the plain model, so that they do not depend on the layers
    assert reads(SMALL, bits=16, context=3, layers=1) == Reads(weights=480.0, rest=128 - 2 * 2 * 4, cache=24)
    assert reads(SMALL, bits=0, context=0, layers=0) == Reads(weights=0.0, rest=2 * (40 + 4 + 4), cache=0)


@pytest.mark.parametrize("change", [{}, {"activation": "relu"}, {"kv_heads": 2}, {"tied_embeddings": False}])
def test_numbers_are_those_that_the_model_holds(change):
    config = dataclasses.replace(SMALL, **change)
    model = Transformer(config)
    assert block_weights(config) == sum(layer.weight.numel() for layer in surgery.linears(model).values())
    head_and_norms = (
        sum(p.numel() for name, p in model.named_parameters() if "norm" in name) + model.head.weight.numel()
    )
    assert reads(config, 16, 0).rest == 2 * (head_and_norms + config.dim)


def test_the_cache_is_that_of_the_model_and_of_the_chapter_on_heads():
    cache = KVCache(SMALL, 1)
    Transformer(SMALL)(torch.zeros(1, 7, dtype=torch.long), cache)
    formula = contents.find("heads").module().cache_bytes(SMALL.layers, SMALL.kv_heads, SMALL.head_dim, 7)
    assert reads(SMALL, 0, 7).cache == formula == cache.nbytes() // 2


@pytest.mark.parametrize("wrong", [{"bits": -1}, {"context": -1}, {"layers": 3}, {"layers": -1}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="at most 2 layers, got"):
        reads(SMALL, **({"bits": 4, "context": 1} | wrong))
