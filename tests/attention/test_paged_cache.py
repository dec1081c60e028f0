"""The cache in blocks behind the model's seams, serving from one pool, and what the chapter does with both."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import paged as chapter
from chapters.attention.paged import BlockManager, paged_attention
from chapters.shared import paged_cache, serving
from chapters.shared.paged_cache import Paged, PagedCache, Pool, attend
from chapters.shared.serving import Request, serve
from minitfm.cache import KVCache
from minitfm.generate import generate
from minitfm.model import Transformer
from tests.attention.pages import batches, state
from tests.conftest import DEVICE, kernel, tolerance
from tests.minitfm.models import tiny_config, tiny_model, tiny_tokenizer, tokens


def tiny_pair(**changes) -> tuple[Transformer, Transformer]:
    """The same small model in float64, to be run plainly and to be served from a pool."""
    plain = tiny_model(**changes).double()
    paged = Transformer(plain.config, attend=attend).double().eval()
    paged.load_state_dict(plain.state_dict())
    return plain, paged


def tiny_pool(blocks: int = 12, size: int = 4, watermark: float = 0.0, **changes) -> Pool:
    """A pool for `tiny_pair`; what nobody wrote is NaN."""
    pool = Pool(tiny_config(**changes), BlockManager(blocks, size, watermark), torch.float64)
    pool.k.fill_(torch.nan)
    pool.v.fill_(torch.nan)
    return pool


class TestCache:
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from([1, 3, 4, 16]))
    def test_hands_out_what_a_contiguous_cache_does(self, sizes, size):
        config, generator = tiny_config(), torch.Generator().manual_seed(sum(sizes))
        plain, cache = KVCache(config, 2, dtype=torch.float64), PagedCache(tiny_pool(60, size), (5, 3))
        for T in sizes:
            assert len(cache) == len(plain)
            for layer in range(config.layers):
                k, v = (torch.randn(2, 2, T, 4, generator=generator, dtype=torch.float64) for _ in "kv")
                expected, found = plain.update(layer, k, v), cache.update(layer, k, v)
                assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    def test_generates_and_truncates_behind_a_plain_model(self):
        plain, _ = tiny_pair()
        prompt = tokens(3, 5)
        cache = PagedCache(tiny_pool(24), range(3))
        assert torch.equal(generate(plain, prompt, 9, cache=cache), generate(plain, prompt, 9))
        assert len(cache) == 13 and cache.nbytes() == 3 * 4 * 4 * 2 * 2 * 2 * 4 * 8
        cache.truncate(6)
        expected = KVCache(plain.config, 3, dtype=torch.float64)
        with torch.no_grad():
            plain(torch.cat([prompt, generate(plain, prompt, 1)[:, -1:]], 1), expected)
            torch.testing.assert_close(plain(prompt, cache), plain(prompt, expected), **tolerance(torch.float64, 100))
        assert len(cache.pool.manager.free_blocks) == 24 - 3 * 3

    def test_forks_write_apart(self):
        plain, paged = tiny_pair()
        pool, prompt = tiny_pool(), tokens(1, 6)
        with torch.no_grad():
            plain(prompt, PagedCache(pool))
            pool.manager.fork(0, 1)
            pool.manager.fork(0, 2, 5)
            assert len(pool.manager.free_blocks) == 10, "nothing is copied yet"
            new = tokens(1, 5, seed=1)
            pool.append({0: 2, 1: 1, 2: 2})
            cache = PagedCache(pool, [0, 1, 2], [2, 1, 2])
            assert cache.positions().tolist() == [6, 7, 6, 5, 6]
            found = paged(new, cache, cache.positions())
            for rows, length in ((slice(0, 2), 6), (slice(2, 3), 6), (slice(3, 5), 5)):
                expected = plain(torch.cat([prompt[:, :length], new[:, rows]], 1))[0, length:]
                torch.testing.assert_close(found[0, rows], expected, **tolerance(torch.float64, 100))
        assert len(pool.manager.free_blocks) == 8, "two of three owners copied the block, the last kept it"

    @given(batches())
    def test_attention_by_torch_is_the_reference(self, problem):
        pools = (torch.from_numpy(pool).double() for pool in (problem.keys, problem.values))
        tables, lengths = torch.from_numpy(problem.tables), torch.from_numpy(problem.lengths)
        keys, values = (Paged(pool, tables, lengths, problem.new.tolist()) for pool in pools)
        found = paged_cache.paged_attention(torch.from_numpy(problem.q).double(), keys, values)
        expected = paged_attention(*problem.arguments(), None, problem.new)
        torch.testing.assert_close(found.numpy(), expected, **tolerance(torch.float64, 100, 10))

    def test_refuses_whole(self):
        pool = tiny_pool(3)
        cache, k = PagedCache(pool, (0, 1)), torch.zeros(2, 2, 5, 4, dtype=torch.float64)
        before = state(pool.manager)
        with pytest.raises(ValueError, match="the pool is full: 4 blocks needed, 3 of them free"):
            cache.update(0, k, k)
        with pytest.raises(ValueError, match=r"this cache takes \(2, 2, 5, 4\), got k \(2, 1, 5, 4\)"):
            cache.update(0, k[:, :1], k[:, :1])
        with pytest.raises(ValueError, match="at least 1 token"):
            pool.append({0: 1, 1: 0})
        assert state(pool.manager) == before and pool.k.isnan().all()
        pool.append({0: 1, 1: 2})
        with pytest.raises(ValueError, match=r"rows without counts must be equally long, got \[1, 2\]"):
            cache.update(0, k, k)
        with pytest.raises(ValueError, match="cannot truncate sequence 0 to 2: 1 held"):
            cache.truncate(2)
        for arguments, complaint in (((), "must be some"), ((1, 1), "and differ, got")):
            with pytest.raises(ValueError, match=complaint):
                PagedCache(pool, arguments)
        with pytest.raises(ValueError, match=r"one count for each of 2 sequences, got \[1\]"):
            PagedCache(pool, (0, 1), [1])

    @pytest.mark.kernel
    def test_the_kernel_takes_what_the_cache_hands_out(self):
        pool = Pool(tiny_config(), BlockManager(12, 4), device=DEVICE)
        pool.append({4: 9, 7: 2})
        generator = torch.Generator().manual_seed(0)
        k, v = (torch.randn(1, 2, 11, 4, generator=generator).to(DEVICE) for _ in "kv")
        PagedCache(pool, [4, 7], [9, 2]).update(0, k, v)
        pool.append({4: 1, 7: 1})
        new = PagedCache(pool, [4, 7], [1, 1]).update(0, k[:, :, :2], v[:, :, :2])
        q = torch.randn(2, 4, 4, generator=generator).to(DEVICE)
        found = kernel("attention.paged").paged_attention(q, new[0].pool, new[1].pool, new[0].tables, new[0].lengths)
        expected = paged_cache.paged_attention(q.cpu(), *(half._replace(pool=half.pool.cpu()) for half in new))
        torch.testing.assert_close(found.cpu(), expected, **tolerance(torch.float32, 10))


@st.composite
def workloads(draw) -> list[Request]:
    """1 to 7 requests of 2 to 24 tokens in all, some of which begin alike."""
    opening = tokens(9, seed=draw(st.integers(0, 99))).tolist()
    requests = []
    for i in range(draw(st.integers(1, 7))):
        own = tokens(draw(st.integers(1, 9)), seed=i).tolist()
        prompt = opening[: draw(st.sampled_from([0, 6, 9]))] + own
        requests.append(Request(prompt, draw(st.integers(1, 24 - len(prompt))), draw(st.sampled_from([0.0, 1.0])), i))
    return requests


class TestServe:
    @settings(max_examples=20)
    @given(workloads(), st.integers(7, 20), st.booleans(), st.sampled_from([0, 0.1]))
    def test_gives_everyone_what_they_would_get_alone(self, requests, blocks, share, watermark):
        plain, paged = tiny_pair()
        pool = tiny_pool(blocks, watermark=watermark)
        steps = serve(paged, pool, requests, share)
        for request in requests:
            alone = generate(plain, torch.tensor([request.prompt]), request.count, temperature=request.temperature,
                             seed=request.seed)  # fmt: skip
            assert request.tokens() == alone[0].tolist()
        assert not pool.manager.tables and len(pool.manager.free_blocks) == blocks
        assert all(step.sequences > 0 and step.positions <= step.blocks * 4 for step in steps)
        assert all(step.blocks * 4 - step.positions < 4 * step.sequences for step in steps)

    def test_sends_the_latest_back_and_loses_nothing(self):
        plain, paged = tiny_pair()
        requests = [Request(tokens(7, seed=i).tolist(), 12) for i in range(3)]
        steps = serve(paged, tiny_pool(7), requests)
        assert sum(step.preempted for step in steps) > 0
        assert [step.sequences for step in steps][:2] == [3, 3], "all are let in at first"
        assert [request.tokens() for request in requests] == [
            generate(plain, torch.tensor([request.prompt]), 12)[0].tolist() for request in requests
        ]

    def test_the_same_opening_is_held_once(self):
        _, paged = tiny_pair()
        opening = tokens(10).tolist()
        blocks = {}
        for share in (False, True):
            requests = [Request(opening, 6, 1.0, seed) for seed in range(4)]
            steps = serve(paged, tiny_pool(20), requests, share)
            blocks[share] = steps[0].blocks, steps[0].apart, steps[0].positions, steps[0].tokens
        assert blocks == {False: (12, 12, 40, 40), True: (2 + 4, 12, 8 + 4 * 2, 40)}

    def test_a_late_request_shares_the_running_one_s_last_block_in_part(self):
        plain, paged = tiny_pair()
        first, filler = tokens(10).tolist(), tokens(9, seed=3).tolist()
        requests = [Request(first, 14), Request(filler, 2), Request([*first, 7, 8], 3)]
        steps = serve(paged, tiny_pool(7), requests, share=True)
        assert any(step.apart > step.blocks for step in steps)
        for request in requests:
            assert request.tokens() == generate(plain, torch.tensor([request.prompt]), request.count)[0].tolist()

    @pytest.mark.parametrize(
        ("request_", "complaint"),
        [
            (Request([], 3), "request 1 needs a prompt, .* context of 32; got 0, 3 and 0 tokens"),
            (Request([1], 0), "got 1, 0 and 0 tokens"),
            (Request([1], 32), "got 1, 32 and 0 tokens"),
            (Request([1], 2, answer=[3]), "got 1, 2 and 1 tokens"),
            (Request([1] * 9, 8), "request 1 of 17 tokens can never run in 4 blocks"),
        ],
    )
    def test_refuses_before_anything_is_done(self, request_, complaint):
        pool, good = tiny_pool(4), Request([1, 2], 3)
        with pytest.raises(ValueError, match=complaint):
            serve(tiny_pair()[1], pool, [good, request_])
        assert good.answer == [] and len(pool.manager.free_blocks) == 4
        pool.append({3: 2})
        with pytest.raises(ValueError, match=r"the pool must be empty, it holds sequences \[3\]"):
            serve(tiny_pair()[1], pool, [good])


class FakeLab:
    """A lab of a random model of context 64."""

    seeds, full = (0,), False

    def __init__(self) -> None:
        self.plain = tiny_model(vocab_size=280, context=64)
        self.config, self.tokenizer, self.validation = self.plain.config, tiny_tokenizer(), tokens(2, 64)

    def model(self, **seams) -> Transformer:
        model = Transformer(self.config, **seams).eval()
        model.load_state_dict(self.plain.state_dict())
        return model

    def calibration(self, seed: int, count: int, length: int) -> torch.Tensor:
        return tokens(count, length, vocabulary=280, seed=seed)


class TestChapter:
    def test_draws_requests_that_fit(self):
        lab = FakeLab()
        for share in (False, True):
            requests = serving.draw_requests(lab, 0, 30, share)
            assert all(1 <= len(r.prompt) and r.count >= 1 and len(r.prompt) + r.count <= 64 for r in requests)
            alike = {tuple(request.prompt[:5]) for request in requests}
            assert len({request.seed for request in requests}) == 30 and (len(alike) == 1) is share

    def test_demonstrates(self):
        parser = argparse.ArgumentParser()
        chapter.options(parser)
        for more in ([], ["--share"]):
            args = parser.parse_args(["--requests", "5", "--blocks", "30", "--block-size", "4", *more])
            found = chapter.demonstrate(FakeLab(), SimpleNamespace(**vars(args), seed=0))
            assert found["tokens that differ from generating alone"] == 0 and isinstance(found["an answer"], str)
            assert 0 <= found["part of the blocks in use that is empty"] < 0.6
        with pytest.raises(ValueError, match="--requests must be at least 1, got 0"):
            chapter.demonstrate(FakeLab(), SimpleNamespace(**{**vars(args), "requests": 0}, seed=0))

    def test_claims_what_it_measures(self):
        claim = chapter.claim(FakeLab())
        assert claim.numbers["tokens that differ from generating alone"] == 0
        assert claim.numbers["part empty, blocks"] < claim.numbers["part empty, contexts reserved"] < 1
        assert 0 < claim.numbers["empty positions of a sequence"] < 16
