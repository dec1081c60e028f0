"""The transformer against definitions written out, and against arrays from the original implementations."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minitfm.cache import KVCache
from minitfm.config import Config, RopeScaling
from minitfm.model import RMSNorm, Transformer, causal_attention, rotary_frequencies, rotate
from tests.conftest import golden, tolerance
from tests.minitfm.models import HEADS, tiny_config, tiny_model, tokens

SEEDS = st.integers(0, 10_000)


@given(heads=HEADS, T=st.integers(1, 7), past=st.integers(0, 9), seed=SEEDS)
def test_causal_attention_is_its_definition(heads, T, past, seed):
    H, Hkv = heads
    S, D = past + T, 6
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(2, H, T, D)), rng.normal(size=(2, Hkv, S, D)), rng.normal(size=(2, Hkv, S, D))
    out = causal_attention(*map(torch.from_numpy, (q, k, v))).numpy()
    for b, h, i in np.ndindex(2, H, T):
        g, seen = h // (H // Hkv), i + S - T + 1
        weights = np.exp(q[b, h, i] @ k[b, g, :seen].T / math.sqrt(D))
        np.testing.assert_allclose(out[b, h, i], weights / weights.sum() @ v[b, g, :seen], **tolerance(np.float64, S))


@pytest.mark.parametrize("case", ["mha_causal", "gqa_causal", "mqa_causal"])
def test_causal_attention_equals_the_golden_arrays(case):
    arrays = golden("attn/gqa_kv_cache_llama")
    q, k, v = (torch.from_numpy(arrays[f"sdpa/{case}/{name}"]).double() for name in "qkv")
    np.testing.assert_allclose(causal_attention(q, k, v), arrays[f"sdpa/{case}/out"], **tolerance(np.float64, 10))


def test_rotation_equals_llama2c_up_to_its_permutation():
    arrays = golden("attn/rope_rmsnorm")
    order = arrays["equiv/perm"]
    for name in ("xq", "xk"):
        x = torch.from_numpy(arrays[f"interleaved_llama2c/{name}"][..., order]).transpose(1, 2)  # [B, H, S, D]
        angles = torch.outer(torch.arange(x.shape[2]).float(), rotary_frequencies(x.shape[3], 10000.0)).repeat(1, 2)
        rotated = rotate(x, angles.cos(), angles.sin()).transpose(1, 2)
        expected = arrays[f"interleaved_llama2c/{name}_out"][..., order]
        np.testing.assert_allclose(rotated, expected, **tolerance(np.float32))


def test_rotary_frequencies_give_llama2c_its_tables():
    arrays = golden("attn/rope_rmsnorm")
    positions = torch.arange(6).float()
    angles = torch.outer(positions, rotary_frequencies(16, 10000.0))
    np.testing.assert_allclose(angles.cos(), arrays["interleaved_llama2c/freqs_cos"], **tolerance(np.float32))
    np.testing.assert_allclose(angles.sin(), arrays["interleaved_llama2c/freqs_sin"], **tolerance(np.float32))


@given(seed=SEEDS, shift=st.integers(0, 100))
def test_rotated_products_depend_on_distance_only(seed, shift):
    rng = np.random.default_rng(seed)
    q, k = torch.from_numpy(rng.normal(size=(2, 8)))
    frequencies = rotary_frequencies(8, 100.0).double()

    def at(x, position):
        angles = (position * frequencies).repeat(2)
        return rotate(x[None], angles.cos(), angles.sin())

    np.testing.assert_allclose(
        (at(q, 5 + shift) * at(k, 2 + shift)).sum(), (at(q, 5) * at(k, 2)).sum(), **tolerance(np.float64, 8, 10)
    )


def test_llama3_stretching_keeps_high_frequencies_and_divides_low_ones():
    scaling = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=64)
    plain, stretched = rotary_frequencies(64, 10000.0), rotary_frequencies(64, 10000.0, scaling)
    turns = 64 * plain / (2 * math.pi)
    assert torch.equal(stretched[turns > 4], plain[turns > 4])
    torch.testing.assert_close(stretched[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and (turns > 4).any() and (turns < 1).any()
    assert ((stretched < plain) & (stretched > plain / 8))[between].all()


@given(seed=SEEDS, width=st.sampled_from([1, 2, 7, 33]), scale=st.sampled_from([1e-12, 1.0, 1e6]))
def test_rms_norm_is_its_definition(seed, width, scale):
    rng = np.random.default_rng(seed)
    x, gain = scale * rng.normal(size=(3, width)), rng.normal(size=width)
    norm = RMSNorm(width, eps=1e-5).double()
    norm.weight.data = torch.from_numpy(gain)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(norm(torch.from_numpy(x)).detach(), expected, rtol=1e-12, atol=0)


def test_rms_norm_in_bfloat16_normalises_in_float32_and_casts_before_the_gain():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(64, eps=1e-5).bfloat16()
    norm.weight.data = torch.linspace(0.5, 2, 64).bfloat16()
    expected = norm.weight * F.rms_norm(x.float(), (64,), eps=1e-5).bfloat16()
    assert torch.equal(norm(x), expected)


@given(heads=HEADS, tied=st.booleans(), activation=st.sampled_from(["swiglu", "relu"]), data=st.data())
def test_prefill_and_decoding_equal_the_uncached_pass(heads, tied, activation, data):
    query_heads, kv_heads = heads
    model = tiny_model(
        heads=query_heads, kv_heads=kv_heads, head_dim=4, tied_embeddings=tied, activation=activation, seed=1
    )
    length = data.draw(st.integers(1, 12))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=length)) | {0, length})
    sequence = tokens(2, length, seed=2)
    cache = KVCache(model.config, batch=2, capacity=length)
    with torch.no_grad():
        whole = model(sequence)
        parts = [model(sequence[:, start:end], cache) for start, end in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **tolerance(torch.float32, 16, 10))
    assert len(cache) == length


def test_a_token_does_not_see_its_future():
    model = tiny_model()
    sequence = tokens(1, 10)
    changed = sequence.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 50
    with torch.no_grad():
        before, after = model(sequence), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(dim=-1).all()


def test_attend_and_feed_forward_are_seams():
    calls = []

    def attend(q, k, v):
        calls.append((tuple(q.shape), tuple(k.shape)))
        return causal_attention(q, k, v)

    config = tiny_config()
    model = Transformer(config, attend=attend, feed_forward=lambda config, layer: torch.nn.Identity())
    model(tokens(3, 5))
    assert calls == [((3, 4, 5, 4), (3, 2, 5, 4))] * 2
    assert isinstance(model.blocks[1].feed_forward, torch.nn.Identity)


def test_tied_embeddings_are_one_tensor_and_count_once():
    tied, untied = tiny_model(tied_embeddings=True), tiny_model(tied_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == 50 * 16


def test_positions_beyond_the_context_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="33 positions asked for, but the model's context is 32"):
        model(tokens(1, 33))
    cache = KVCache(model.config, capacity=40)
    model(tokens(1, 30), cache)
    with pytest.raises(ValueError, match="33 positions"):
        model(tokens(1, 3), cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"layers": 1.5}, "layers must be a positive integer, got 1.5"),
        ({"heads": 4, "kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"dim": 18}, "dim=18 is not divisible by heads=4"),
        ({"head_dim": 5}, "head_dim must be even for rotary positions, got 5"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_config_refuses_sizes_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(**changes)


def test_config_survives_its_dictionary():
    config = tiny_config(rope_scaling=RopeScaling(factor=4.0), head_dim=6)
    assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown config fields"):
        Config.from_dict({"vocab_size": 5, "colour": 1})
    with pytest.raises(ValueError, match="lacks vocab_size"):
        Config.from_dict({})


def test_a_model_told_where_its_tokens_stand():
    model, row = tiny_model(), tokens(2, 6)
    assert torch.equal(model(row, positions=torch.arange(6)), model(row))
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    blind = Transformer(model.config, attend=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    blind.load_state_dict(model.state_dict())
    found = blind(row[:, shuffled], positions=shuffled)  # where every token sees all, their order means nothing
    torch.testing.assert_close(found, blind(row)[:, shuffled], **tolerance(torch.float32, 16))
    for bad, complaint in (
        (torch.arange(5), r"positions must be 6, from 0 on, got \[0, 1, 2, 3, 4\]"),
        (torch.arange(6) - 1, "from 0 on, got"),
        (torch.arange(6) + 27, "33 positions asked for, but the model's context is 32"),
    ):
        with pytest.raises(ValueError, match=complaint):
            model(row, positions=bad)
