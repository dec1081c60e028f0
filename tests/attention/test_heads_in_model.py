"""Grouped heads in the model: pooling a checkpoint, decoding sequences of different lengths, bytes, refusals."""

from __future__ import annotations

import argparse
import cmath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from chapters.attention import heads
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.model import Transformer, rotate
from tests.attention.test_heads import REFUSED, on_device, problem
from tests.conftest import DEVICE, golden, kernel, tolerance

fast = kernel("attention.heads")


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 6, 16]))
def test_the_permutation_makes_one_layout_the_other_and_scores_stay(seed, D):
    x, y = np.random.default_rng(seed).normal(size=(2, 7, D))
    tables, order = heads.rotary_tables(7, D), heads.half_split_order(D)
    inside = [heads.rotate(z, *tables, "interleaved") for z in (x, y)]
    halves = [heads.rotate(z[:, order], *tables) for z in (x, y)]
    for one, other in zip(inside, halves, strict=True):
        np.testing.assert_array_equal(one[:, order], other)
    np.testing.assert_allclose(inside[0] @ inside[1].T, halves[0] @ halves[1].T, **tolerance(float, D, 8))


def test_tables_are_powers_of_theta_and_those_of_llama2c():
    cos, sin = heads.rotary_tables(9, 6, theta=100.0)
    for p, i in np.ndindex(9, 3):
        expected = cmath.exp(1j * p * 100.0 ** (-2 * i / 6))
        assert abs(complex(cos[p, i], sin[p, i]) - expected) < 1e-12
    arrays = golden("attn/rope_rmsnorm")
    for name, table in zip(("cos", "sin"), heads.rotary_tables(6, 16), strict=True):
        np.testing.assert_allclose(table, arrays[f"interleaved_llama2c/freqs_{name}"], **tolerance(np.float32))
    with pytest.raises(ValueError, match="even"):
        heads.rotary_tables(4, 5)


def model(kv_heads: int = 0, **config) -> Transformer:
    torch.manual_seed(0)
    shape = Config(vocab_size=32, dim=24, hidden_dim=32, layers=2, heads=4, kv_heads=kv_heads, context=40, **config)
    return Transformer(shape).eval()


def test_a_pooled_model_has_means_for_keys_and_values_and_copies_of_the_rest():
    plain = model()
    kept = {name: weight.clone() for name, weight in plain.state_dict().items()}
    pooled = heads.group_heads(plain, 2)
    assert pooled.config.kv_heads == 2 and plain.config.kv_heads == 4 and not pooled.training
    for name, weight in pooled.state_dict().items():
        expected = kept[name]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            expected = expected.view(2, 2, 6, 24).mean(1).view(12, 24)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-7)
        assert torch.equal(plain.state_dict()[name], kept[name])
        assert weight.data_ptr() != plain.state_dict()[name].data_ptr()
    assert pooled.head.weight is pooled.embedding.weight, "tied weights stay tied"


@torch.no_grad()
def test_a_model_whose_heads_agree_loses_nothing_and_an_unpooled_one_neither():
    grouped = model(kv_heads=1)
    spread = Transformer(Config(**{**grouped.config.to_dict(), "kv_heads": 4}))
    spread.load_state_dict(
        {n: w.repeat(4, 1) if "k_proj" in n or "v_proj" in n else w for n, w in grouped.state_dict().items()}
    )
    tokens = torch.randint(0, 32, (2, 9))
    for kv_heads in (4, 2, 1):
        logits = heads.group_heads(spread, kv_heads)(tokens)
        torch.testing.assert_close(logits, grouped(tokens), **tolerance(torch.float32, 9))


@pytest.mark.parametrize("kv_heads", [3, 0, 8])
def test_heads_that_do_not_divide_are_refused(kv_heads):
    with pytest.raises(ValueError, match="kv_heads"):
        heads.group_heads(model(kv_heads=4), kv_heads)


def test_a_broken_weight_is_refused_before_anything_changes():
    plain = model()
    with torch.no_grad():
        plain.get_parameter("blocks.1.attention.v_proj.weight")[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        heads.pool_projections(plain, 2)
    assert plain.config.kv_heads == 4 and plain.get_parameter("blocks.0.attention.k_proj.weight").shape == (24, 24)


@torch.no_grad()
@given(st.sampled_from([4, 2, 1]), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 99))
def test_sequences_of_different_lengths_decode_together_as_each_does_alone(kv_heads, lengths, seed):
    net, rng = model(kv_heads), torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 32, (len(lengths), 12), generator=rng)
    caches = torch.zeros(2, 2, len(lengths), kv_heads, 40, 6)
    positions = torch.zeros(len(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):  # each is prefilled by itself
        alone = KVCache(net.config)
        net(tokens[row : row + 1, :length], alone)
        caches[:, :, row, :, :length] = torch.stack((alone.k, alone.v))[:, :, 0, :, :length]
        positions[row] = length
    for _ in range(2):
        newest = tokens.gather(1, positions[:, None])[:, 0]
        logits = heads.decode_step(net, newest, *caches, positions)
        positions += 1
        for row, length in enumerate(positions.tolist()):
            expected = net(tokens[row : row + 1, :length])[0, -1]
            torch.testing.assert_close(logits[row], expected, **tolerance(torch.float32, 12))


def test_decoding_past_the_cache_is_refused():
    caches = torch.zeros(2, 2, 1, 2, 5, 6)
    with pytest.raises(ValueError, match="from 0 to 4"):
        heads.decode_step(model(2), torch.zeros(1, dtype=torch.int64), *caches, torch.tensor([5]))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_bytes_are_those_of_a_real_cache(kv_heads):
    net = model(kv_heads)
    cache = KVCache(net.config, batch=3, dtype=torch.float16)
    cache.lengths = [7] * 2
    assert cache.nbytes() == heads.cache_bytes(2, kv_heads, 6, length=7, batch=3)
    assert heads.token_bytes(net) == heads.cache_bytes(2, kv_heads, 6, length=1, itemsize=4)
    whole = heads.decode_bytes(1000, 2, kv_heads, 6, length=7, batch=3)
    assert 3 * whole == pytest.approx(2 * 1000 + cache.nbytes())


def test_apply_pools_trains_and_reports_what_is_left():
    net, tokens = model(), torch.randint(0, 32, (8, 20), generator=torch.Generator().manual_seed(0))
    names = set(net.state_dict())
    args = argparse.Namespace(kv_heads=2, steps=2, seed=0)
    report = heads.apply(net, tokens, args)
    before, after = (sum(w.numel() for n, w in m.named_parameters() if "_proj" in n) for m in (model(), net))
    assert report["bits per weight"] == pytest.approx(32 * after / before) and net.config.kv_heads == 2
    assert report["cache bytes per token"] == "384 -> 192" and set(net.state_dict()) == names
    pooled = heads.group_heads(model(), 2)
    assert not torch.equal(net.embedding.weight, pooled.embedding.weight), "it was trained"
    with pytest.raises(ValueError, match="--steps"):
        heads.apply(net, tokens, argparse.Namespace(kv_heads=1, steps=-1, seed=0))


def test_the_sweep_has_both_ends_and_one_between():
    assert heads.sweep(4) == [4, 2, 1] and heads.sweep(2) == [2, 1] and heads.sweep(3) == [3, 1]
    assert heads.sweep(32) == [32, 16, 1]
    with pytest.raises(ValueError, match="one key/value head already"):
        heads.sweep(1)


WORDS = ["columns", "multiple of 2 rows", "divide", "divide", "need qkv", "need qkv", "from 0 to 6", "from 0 to 6",
         "need qkv", "int64", "int64", "need qkv", "cos and sin", "need qkv", "cos and sin"]  # fmt: skip


@pytest.mark.parametrize(("case", "words"), [*zip(REFUSED, WORDS, strict=True)])
def test_append_says_what_it_refuses(case, words):
    p = problem(positions=[1, 2])
    setattr(p, *case)
    with pytest.raises(ValueError, match=words):
        heads.rope_append(p.qkv, p.k, p.v, p.positions, *p.tables)
    tensors = [torch.from_numpy(x) for x in (p.qkv, p.k, p.v, p.positions, *p.tables)]
    with pytest.raises(ValueError, match=words):
        heads.split_and_append(*tensors)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write of tensors with heads (4-D), as each goes to memory by itself."""

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mul", "add", "neg", "cat", "copy_"):
            given = args[0] if name == "cat" else args[1:] if name == "copy_" else args
            self.moved += sum(x.nbytes for x in (*given, out) if isinstance(x, torch.Tensor) and x.dim() == 4)
        return out


@pytest.mark.skipif(fast is None, reason="the counts stand in the kernel's file, and Triton is not installed")
def test_the_naive_bytes_are_those_that_torch_moves():
    qkv, tables = torch.ones(1, 6, 8 * 10), torch.ones(6, 10)
    k_cache, v_cache = torch.zeros(2, 1, 2, 9, 10)
    with Traffic() as traffic:
        q, k, v = qkv.view(1, 6, 8, 10).transpose(1, 2).split([4, 2, 2], dim=1)
        rotate(q, tables, tables)
        k_cache[:, :, 3:9] = rotate(k, tables, tables)
        v_cache[:, :, 3:9] = v
    assert traffic.moved == fast.naive_bytes(6, 4, 2, 10, itemsize=4)
    assert fast.floor_bytes(6, 4, 2, 10, itemsize=4) == 2 * qkv.nbytes


@pytest.mark.kernel
def test_kernel_refuses():
    p = problem(positions=[1, 2])
    good = dict(zip(("qkv", "k_cache", "v_cache", "positions", "cos", "sin"), on_device(p, torch.float32), strict=True))

    def like(name, *shape, **kind):
        return {name: torch.zeros(shape, **{"device": DEVICE} | kind)}

    refused = [
        (like("qkv", 6, 47), "columns"),
        (like("qkv", 5, 48), "multiple of 2 rows"),
        (like("qkv", 6, 42), "must divide"),
        (like("qkv", 6, 24), "must divide"),
        (like("v_cache", 2, 2, 8, 6), "need qkv"),
        (like("positions", 3, dtype=torch.int64), "need qkv"),
        (like("cos", 8, 3), "cos must be"),
        (like("sin", 9, 6), "sin must be"),
        ({"qkv": torch.zeros(48, 6, device=DEVICE).T}, "qkv must be contiguous"),
        ({"layout": "neox"}, "layout"),
        ({"block": 12}, "power of two"),
    ]
    for change, words in refused:
        with pytest.raises(ValueError, match=words):
            fast.rope_append(**good | change)
    for change in (like("qkv", 6, 48, dtype=torch.float64), like("k_cache", 2, 2, 9, 6, dtype=torch.float16),
                   like("cos", 11, 3, dtype=torch.float64), like("positions", 2, dtype=torch.int32)):  # fmt: skip
        with pytest.raises(TypeError, match=f"{next(iter(change))} must have dtype"):
            fast.rope_append(**good | change)


def test_the_same_steps_give_the_same_model():
    stream = torch.randint(0, 32, (200,), generator=torch.Generator().manual_seed(1))
    nets = [heads.group_heads(model(), 1) for _ in range(2)]
    for net in nets:
        heads.uptrain(net, stream, 2, seed=3)
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, other)
    assert np.isfinite(one.detach().numpy()).all()


@pytest.mark.kernel
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_what_bench_compares_with_is_the_same(layout):
    p = problem(positions=[1, 6])
    qkv, k, v, *rest = on_device(p, torch.float16)
    k.zero_()
    v.zero_()
    expected = fast.expected(qkv, k, v, *rest, layout)
    peers = fast.by_torch(qkv, k.clone(), v.clone(), *rest, layout)
    for found in (fast.run(qkv, k, v, *rest, layout), peers):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.float(), other, **tolerance(torch.float16))
