"""The cache that holds codes: what it hands out and when it packs, its bytes, and what the chapter does with it."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import kv_cache as chapter
from chapters.quantization.kv_cache import pack, quantize, read
from chapters.shared import quantized_cache
from chapters.shared.quantized_cache import KIVI_KEYS, KIVI_VALUES, Plan, QuantizedCache, Store, attend, encode, expand
from minitfm.cache import KVCache
from minitfm.generate import generate
from tests.conftest import DEVICE, tolerance
from tests.minitfm.models import tiny_config, tiny_model, tiny_tokenizer, tokens
from tests.quantization.caches import half, numbers

CHANNEL, TOKEN = Plan("channel", 4, 2, 4, "kivi"), Plan("token", 4, 4, 3)


@given(numbers(dtypes=(np.float16, np.float32)), st.sampled_from([2, 4, 8]), st.sampled_from(["flexgen", "kivi"]))
def test_torch_finds_the_codes_of_the_reference(x, bits, rule):
    x = np.repeat(x, 8, axis=-1)  # whole bytes
    for per, size in (("token", 8), ("channel", x.shape[-2]), ("token", 24), ("channel", 3)):
        if rule == "kivi" and x.shape[-1 if per == "token" else -2] % size:
            continue
        codes, grid = quantize(x, bits, size, per, rule)
        found = encode(torch.from_numpy(x), Plan(per, bits, size, 0, rule))
        np.testing.assert_array_equal(found[0].numpy(), pack(codes, bits))
        np.testing.assert_array_equal(found[1].numpy(), grid)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", ["flexgen", "kivi"])
def test_what_is_not_finite_does_not_pass_for_a_number(bad, rule):
    store = Store(Plan("token", 4, 4, 0, rule), (1, 1, 4, 8), torch.float32, "cpu")
    new = torch.ones(1, 1, 1, 8)
    new[..., 5] = bad
    store.update(new)
    found = expand(store.held(), torch.float32)
    assert (found[..., :4] == 1).all() and not found[..., 4:].isfinite().any()


def test_expand_is_what_the_reference_reads():
    part = half(np.random.default_rng(0), (2, 2, 21, 24), 2, 16, "token", 13)
    held = quantized_cache.Held(*(torch.from_numpy(array) for array in part.held[:3]), *part.held[3:])
    np.testing.assert_allclose(expand(held, torch.float64).numpy(), part.numbers, **tolerance(np.float32))
    np.testing.assert_allclose(read(part.held, 24), part.numbers, **tolerance(np.float64))


class TestStore:
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([CHANNEL, TOKEN, Plan("token", 8, 8)]))
    def test_keeps_the_newest_exactly_and_packs_the_rest_once(self, sizes, plan):
        store, seen = Store(plan, (1, 2, 99, 8), torch.float32, "cpu"), torch.empty(1, 2, 0, 8)
        for size in sizes:
            new, before = torch.randn(1, 2, size, 8, generator=torch.Generator().manual_seed(size)), store.packed
            held = store.update(new)
            seen, exact = torch.cat([seen, new], dim=2), held.window.shape[2]
            assert held.packed == before and torch.equal(held.window, seen[:, :, -exact:]) and exact >= size
            expected = {"channel": len(store) % 4, "token": min(len(store), plan.residual)}[plan.per]
            assert len(store) == seen.shape[2] and store.window.shape[2] == expected
            assert torch.equal(store.window, seen[:, :, len(store) - expected :])
            whole, _ = encode(seen[:, :, : store.packed], plan)
            assert torch.equal(store.codes[:, :, : store.packed], whole), "whole groups: when does not matter"

    def test_handed_out_halves_do_not_change(self):
        store = Store(TOKEN, (1, 1, 20, 8), torch.float32, "cpu")
        held = [store.update(torch.randn(1, 1, 2, 8)) for _ in range(4)]
        before = [expand(one, torch.float32) for one in held]
        store.update(torch.randn(1, 1, 9, 8))
        assert all(torch.equal(expand(one, torch.float32), was) for one, was in zip(held, before, strict=True))

    @pytest.mark.parametrize("plan", [CHANNEL, TOKEN])
    @pytest.mark.parametrize("length", [0, 3, 8, 11, 14])
    def test_truncating_changes_nothing_of_what_stays(self, plan, length):
        store = Store(plan, (1, 2, 40, 8), torch.float32, "cpu")
        store.update(torch.randn(1, 2, 14, 8))
        before = expand(store.held(), torch.float32)
        store.truncate(length)
        assert len(store) == length and store.window.shape[2] == plan.window(length)
        assert torch.equal(expand(store.held(), torch.float32), before[:, :, :length])
        held = store.update(before[:, :, :5])
        after = torch.cat([before[:, :, :length], before[:, :, :5]], dim=2)
        assert torch.equal(expand(held, torch.float32), after)

    @pytest.mark.parametrize(("per", "bits", "size"), [("token", 4, 32), ("token", 2, 64), ("channel", 2, 32)])
    def test_counts_the_bytes_of_the_formula(self, per, bits, size):
        store = Store(Plan(per, bits, size, 0), (3, 2, 128, 64), torch.float16, "cpu")
        store.update(torch.randn(3, 2, 128, 64))
        assert store.nbytes() == 3 * 2 * 128 * 64 * (bits + 32 / size) / 8
        assert store.nbytes() == store.codes.nbytes + store.grid.nbytes, "a full cache is all of its buffers"
        store = Store(Plan(per, bits, size, 64), (3, 2, 200, 64), torch.float16, "cpu")
        store.update(torch.randn(3, 2, 128 + (0 if per == "token" else 63), 64))
        packed, exact = (64, 64) if per == "token" else (128, 63)
        assert store.nbytes() == 3 * 2 * 64 * (packed * (bits + 32 / size) / 8 + 2 * exact)

    def test_refuses_rows_that_it_cannot_cut(self):
        for plan, complaint in (
            (Plan("token", 2, 2), "head_dim=6 codes of 2 bits do not fill bytes"),
            (Plan("token", 4, 4, 0, "kivi"), "group_size must divide head_dim=6 by the rule of KIVI, got 4"),
        ):
            with pytest.raises(ValueError, match=complaint):
                Store(plan, (1, 1, 4, 6), torch.float16, "cpu")


class TestPlan:
    def test_kivi_keeps_what_fills_no_block_of_keys_and_the_last_values(self):
        assert [KIVI_KEYS.window(length) for length in (0, 1, 127, 128, 129, 300)] == [0, 1, 127, 0, 1, 44]
        assert [KIVI_VALUES.window(length) for length in (0, 1, 128, 129)] == [0, 1, 128, 128]
        assert Plan("channel", 2, 32).window(40) == 8 and Plan().window(40) == 0

    @pytest.mark.parametrize(
        ("changed", "complaint"),
        [
            ({"per": "row"}, "need per token or channel, .* got 'row' and 'flexgen'"),
            ({"rule": "gptq"}, "got 'token' and 'gptq'"),
            ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
            ({"bits": True}, "got True"),
            ({"group_size": 0}, "group_size must be at least 1, got 0"),
            ({"residual": -1}, "residual must be at least 0, got -1"),
            ({"per": "channel", "residual": 32}, "per channel, a multiple of group_size=64, got 32"),
        ],
    )
    def test_names_what_it_refuses(self, changed, complaint):
        with pytest.raises(ValueError, match=complaint):
            Plan(**changed)


class TestQuantizedCache:
    def test_in_8_bits_the_model_says_nearly_the_same(self):
        model, sequence = tiny_model(), tokens(2, 20)
        plans = Plan("channel", 8, 2, 4, "kivi"), Plan("token", 8, 4, 3, "kivi")
        cache = QuantizedCache(model.config, *plans, batch=2, dtype=torch.float32)
        with torch.no_grad():
            found = [model(part, cache) for part in sequence.split([7, 1, 1, 5, 1, 4, 1], dim=1)]
            expected = model(sequence)
        assert len(cache) == 20
        torch.testing.assert_close(found[0], expected[:, :7])  # what a call brings, it sees exactly
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0.05, atol=0.05)

    def test_decoding_after_truncation_equals_decoding_from_scratch(self):
        model, sequence = tiny_model(), tokens(1, 12)
        made = [QuantizedCache(model.config, CHANNEL, Plan("token", 4, 4), dtype=torch.float32) for _ in "ab"]
        with torch.no_grad():
            model(sequence[:, :8], made[0])
            model(tokens(1, 9, seed=5), made[1])
            made[1].truncate(0)
            model(sequence[:, :8], made[1])
            model(sequence[:, 8:], made[1])
            made[1].truncate(8)
            assert torch.equal(model(sequence[:, 8:], made[0]), model(sequence[:, 8:], made[1]))

    @pytest.mark.kernel  # on a GPU it is called
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_attending_to_codes_is_attending_to_what_they_stand_for(self, dtype):
        model = tiny_model(head_dim=16).to(DEVICE, dtype)
        codes, prompt = tiny_model(head_dim=16), tokens(1, 9).to(DEVICE)
        codes = type(codes)(codes.config, attend=attend).to(DEVICE, dtype)
        codes.load_state_dict(model.state_dict())
        found = []
        for one, fused in ((model, False), (codes, True)):
            cache = QuantizedCache(one.config, CHANNEL, TOKEN, dtype=dtype, device=DEVICE, fused=fused)
            with torch.no_grad():
                found.append([one(part, cache) for part in (prompt, prompt[:, :1], prompt[:, :3], prompt[:, :1])])
        for expected, logits in zip(*found, strict=True):
            torch.testing.assert_close(logits, expected, **tolerance(dtype, 16))

    def test_it_counts_all_layers_and_generates(self):
        model = tiny_model()
        cache = QuantizedCache(model.config, Plan("token", 4, 4), Plan("token", 4, 4), capacity=16)
        generate(model, tokens(1, 8), 8, cache=cache)
        assert len(cache) == 15 and cache.nbytes() == 15 * 2 * model.config.layers * 2 * (4 * 4 + 32) // 8
        plain = KVCache(model.config, dtype=torch.float16)
        generate(model, tokens(1, 8), 0, cache=plain)
        assert attend(*(torch.ones(1, 1, 1, 4) for _ in "qkv")).shape == (1, 1, 1, 4), "plain tensors pass"

    def test_refuses_what_the_plain_cache_does(self):
        cache = QuantizedCache(tiny_config(), TOKEN, TOKEN, capacity=5)
        three = torch.ones(1, 2, 3, 4)
        for layer in range(2):
            cache.update(layer, three, three)
        with pytest.raises(ValueError, match="cache is full: 3 positions held, 3 new, capacity 5"):
            cache.update(0, three, three)
        with pytest.raises(ValueError, match=r"cache holds \[batch=1, kv_heads=2, T, head_dim=4\]"):
            cache.update(0, three[:, :1], three[:, :1])
        with pytest.raises(ValueError, match="cannot truncate to 4: cache holds 3 positions"):
            cache.truncate(4)
        with pytest.raises(ValueError, match="batch and capacity must be positive"):
            QuantizedCache(tiny_config(), TOKEN, TOKEN, batch=0)
        assert len(cache) == 3


def bench(seeds: tuple[int, ...] = (0,)) -> SimpleNamespace:
    """A lab of the tiny model, with head_dim 8 and texts of 20 tokens."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(head_dim=8, vocab_size=tokenizer.vocab_size)
    texts = tokens(6, 20, vocabulary=tokenizer.vocab_size)
    return SimpleNamespace(
        config=model.config, model=lambda: model, validation=texts, length=20, seeds=seeds, tokenizer=tokenizer
    )


class TestChapter:
    def test_demonstrates_what_its_options_ask_for(self):
        parser = argparse.ArgumentParser()
        chapter.options(parser)
        args = parser.parse_args(["--bits", "8", "--group-size", "8", "--residual", "8"])
        found = chapter.demonstrate(bench(), args)
        assert found["perplexity, quantized cache"] == pytest.approx(found["perplexity, plain cache"], rel=0.02)
        assert found["bytes per token, plain cache in 16 bits"] == 2 * 2 * 2 * 2 * 8
        args.group_size = 3
        with pytest.raises(ValueError, match="group_size"):
            chapter.demonstrate(bench(), args)

    @pytest.mark.parametrize(
        ("keys", "values", "four", "holds"),
        [(1.0, 1.0, 0.1, True), (1.0, 0.1, 0.1, True), (3.0, 1.0, 0.1, False), (1.0, 1.0, 0.9, False)],
    )
    def test_claim_is_computed_from_what_it_measures(self, keys, values, four, holds, monkeypatch):
        def measured(lab, plans, part):
            if plans is None:
                return 30.0 + part, 64.0
            if plans[0].bits == 4:
                return 30 + four + part, 20.0
            k, v = (plan.per for plan in plans)
            return 30 + part + (keys if k == "channel" else 4) + (values if v == "channel" else 0.2), 12.0

        monkeypatch.setattr(chapter, "measure", measured)
        made = chapter.claim(bench((0, 1)))
        assert made.holds == holds and made.numbers["perplexity, 16 bits"] == 30.5
        assert f"raises perplexity 30.50 by {four:.2f}" in made.sentence and "1/3.2 of the bytes" in made.sentence
        assert ("shows, too" in made.sentence) == (values > 0.2)

    def test_measures_the_bytes_that_are_held(self):
        plans = (Plan("token", 4, 32),) * 2
        perplexity, nbytes = chapter.measure(bench(), plans, 0)
        assert nbytes == 2 * 2 * 2 * (8 * 4 + 32) / 8 and perplexity > 1
        assert chapter.measure(bench(), None, 0)[1] == 2 * 2 * 2 * 8 * 2
