"""FlashAttention's variants in the model: the torch code, trained; packed sequences, generated; memory and tiles."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import flash_variants
from chapters.shared.memory import peak_bytes
from chapters.shared.packed_sequences import PackedCache
from minitfm.config import Config
from minitfm.generate import generate
from minitfm.model import Transformer
from tests.attention.checks import assert_close
from tests.attention.problems import HEADS
from tests.attention.variants import variants
from tests.conftest import DEVICE, kernel, oracle, tolerance

book, fast = oracle("attention.flash_variants"), kernel("attention.flash_variants")
SHAPE = Config(vocab_size=32, dim=48, hidden_dim=32, layers=2, heads=6, kv_heads=2, context=200)


@settings(max_examples=20)
@given(variants(lengths=st.integers(1, 150), head_sizes=st.integers(1, 8), heads=HEADS[:5], causal=st.just(True)))
def test_attend_is_the_reference_and_so_is_its_gradient(variant):
    options = {name: x for name, x in variant.options("cpu").items() if name not in ("causal", "scale")}
    tensors = [torch.from_numpy(x).requires_grad_() for x in variant.arrays]
    out = flash_variants.attend(*tensors, **options)
    options = {name: x for name, x in variant.options().items() if name != "scale"}
    forward = book.attention(*variant.arrays, **options)
    assert_close(out.detach(), forward[0], variant.problem)
    dout = variant.problem.dout
    expected = book.flash_attention_backward(dout, *variant.arrays, *forward, **options)
    for gradient, truth in zip(torch.autograd.grad(out, tensors, torch.from_numpy(dout)), expected, strict=True):
        assert_close(gradient, truth, variant.problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attend_sums_in_float32_and_returns_its_dtype(dtype):
    x = torch.randn(1, 2, 90, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    slopes = np.array([0.3, 0.1])
    out = flash_variants.attend(x, x, x, (20, None), 5.0, torch.from_numpy(slopes))
    assert out.dtype == dtype
    expected = book.attention(*[x.double().numpy()] * 3, window=(20, None), softcap=5.0, slopes=slopes)[0]
    once = torch.finfo(dtype).eps  # rounded to the dtype at the end only
    np.testing.assert_allclose(out.double(), expected, rtol=once, atol=tolerance(torch.float32)["atol"])


def test_windows_need_memory_for_tiles_and_not_for_the_text():
    def held(length: int) -> int:
        q = torch.ones(1, 2, length, 8, requires_grad=True)
        return peak_bytes(lambda: torch.autograd.grad(flash_variants.attend(q, q, q, (63, None)).sum(), q))

    tiles = [held(n * flash_variants.TILE) for n in (4, 8, 12)]
    assert tiles[2] - tiles[1] <= 1.05 * (tiles[1] - tiles[0])
    assert tiles[2] - tiles[1] < 64 * 4 * flash_variants.TILE * 2 * 8  # a few numbers for each of q, and no scores


def packed_model(lengths: list[int], **options) -> tuple[Transformer, Transformer, PackedCache]:
    """The same random weights: plain, and with all sequences in one row."""
    torch.manual_seed(0)
    cache = PackedCache(len(lengths), lambda *qkv, **cuts: flash_variants.attend(*qkv, **cuts, **options))
    plain, packed = Transformer(SHAPE), Transformer(SHAPE, attend=cache.attend)
    packed.load_state_dict(plain.state_dict())
    return plain.double().eval(), packed.double().eval(), cache


@torch.no_grad()
def test_packed_prompts_chunks_and_steps_are_as_each_by_itself():
    """Three passes: prompts of some, chunks of others beside single tokens, and nothing new for one of them."""
    plain, packed, cache = packed_model([0, 0, 0])
    texts = [torch.randint(0, 32, (n,)) for n in (70, 9, 33)]
    expected, done = [plain(text[None])[0] for text in texts], [0, 0, 0]
    for new in ([66, 1, 20], [1, 8, 0], [3, 0, 13]):
        row = torch.cat([text[start : start + n] for text, start, n in zip(texts, done, new, strict=True)])
        logits = packed(row[None], cache, cache.announce(new))[0].split(new)
        for found, truth, start, n in zip(logits, expected, done, new, strict=True):
            torch.testing.assert_close(found, truth[start : start + n], **tolerance(torch.float64, 70, scale=30))
        done = [start + n for start, n in zip(done, new, strict=True)]
    assert len(cache) == 70
    cache.truncate(0)
    assert len(cache) == 0 and cache.announce([2, 1, 1]).tolist() == [0, 1, 0, 0]


@torch.no_grad()
def test_gradients_reach_packed_sequences_as_padded_ones():
    plain, packed, cache = packed_model([5, 12])
    texts = [torch.randint(0, 32, (n,)) for n in (5, 12)]
    with torch.enable_grad():
        alone = sum(plain(text[None]).logsumexp(-1).sum() for text in texts)
        together = packed(torch.cat(texts)[None], cache, cache.announce([5, 12])).logsumexp(-1).sum()
        pairs = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((alone, plain), (together, packed))]
    for truth, found in zip(*pairs, strict=True):
        torch.testing.assert_close(found, truth, **tolerance(torch.float64, 17, scale=17))


@torch.no_grad()
def test_greedy_tokens_are_those_of_each_prompt_alone():
    plain, packed, cache = packed_model([6, 1, 17])
    prompts = [torch.randint(0, 32, (n,)) for n in (6, 1, 17)]
    fed, new, answers = torch.cat(prompts), [6, 1, 17], []
    for _ in range(8):
        fed = packed(fed[None], cache, cache.announce(new))[0, torch.tensor(new).cumsum(0) - 1].argmax(-1)
        answers, new = [*answers, fed], [1, 1, 1]
    alone = torch.cat([generate(plain, prompt[None], 8)[:, -8:] for prompt in prompts])
    assert torch.equal(torch.stack(answers, dim=1), alone)


def test_packed_cache_refuses():
    cache = PackedCache(2, flash_variants.attend)
    with pytest.raises(ValueError, match="sequences must be"):
        PackedCache(0, flash_variants.attend)
    for new in ([1], [0, 0], [2, -1]):
        with pytest.raises(ValueError, match="new must be 2 counts"):
            cache.announce(new)
    cache.announce([2, 1])
    with pytest.raises(ValueError, match=r"must be \[1, Hkv, 3, D\]"):
        cache.update(0, *[torch.zeros(1, 2, 4, 8)] * 2)
    with pytest.raises(ValueError, match="truncated to 0"):
        cache.truncate(1)


def test_the_model_runs_with_the_chapter_s_seams():
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attend = flash_variants.seams(SimpleNamespace(window=3, softcap=2.0, alibi=True))["attend"]
    slopes = flash_variants.alibi_slopes(2)
    expected = book.attention(*[x.numpy()] * 3, window=(2, None), softcap=2.0, slopes=slopes)[0]
    np.testing.assert_allclose(attend(x, x, x), expected, **tolerance(np.float64, 9))


@pytest.mark.kernel
def test_kernel_under_autograd_with_the_tiles_that_it_picks_itself():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 19, 16, generator=generator).to(DEVICE).requires_grad_() for heads in (2, 1, 1))
    slopes = torch.tensor([0.5, 0.25], device=DEVICE)
    options = {"window": (7, None), "softcap": 3.0, "slopes": slopes, "cu_q": torch.tensor([0, 4, 19]).to(DEVICE)}
    out, lse = fast.flash_attention(q, k, v, **options)
    assert not lse.requires_grad
    gradients = torch.autograd.grad(out.sum(), (q, k, v))  # its gradient is one number, expanded: strides of zero
    detached = (q.detach(), k.detach(), v.detach(), out.detach(), lse)
    expected = fast.flash_attention_backward(torch.ones_like(q), *detached, **options)
    for gradient, truth in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=0, atol=0)


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_a_nan_stays_in_its_window_and_its_sequence():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 16, generator=generator).to(DEVICE) for _ in range(3))
    k[0, 0, 20, 3] = torch.nan
    blocks = {"block_q": 16, "block_k": 16}
    out, lse = fast.flash_attention(q, k, v, window=(5, None), softcap=9.0, cu_q=[0, 23, 40], **blocks)
    met = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    met[20:23] = True
    assert torch.equal(lse[0, 0].isnan(), met)
    assert out[0, 0, met].isnan().all() and out[0, 0, ~met].isfinite().all()
