"""Adaptive span around the exercises: learning in the model, trimmed decoding, the backward kernels, refusals."""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chapters.attention import adaptive_span as chapter
from chapters.shared.span_layers import AdaptiveSpan, TrimmedCache
from minitfm import evaluate, surgery
from minitfm.cache import KVCache
from minitfm.config import Config
from minitfm.generate import generate
from minitfm.model import Transformer
from tests.attention.checks import assert_close, assert_kernel_close
from tests.attention.on_device import DTYPES, PLACES, TILES, on_device
from tests.attention.problems import HEADS
from tests.attention.spans import Spanned, gradients_by_autograd, refusals, span_problems, spanned
from tests.conftest import DEVICE, kernel, oracle, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # logarithms of what is then masked out
book, fast = oracle("attention.adaptive_span"), kernel("attention.adaptive_span")
PROBLEMS = span_problems(st.integers(1, 6), st.sampled_from((0, 1, 5, 11)), st.sampled_from((1, 3, 8)))
SMALL = span_problems(
    st.sampled_from((1, 17, 33)), st.sampled_from((0, 1, 30)), st.sampled_from((1, 16, 24)), HEADS[:5]
)


def model(kv_heads: int = 0, layers: int = 2) -> Transformer:
    torch.manual_seed(0)
    shape = Config(vocab_size=32, dim=24, hidden_dim=32, layers=layers, heads=4, kv_heads=kv_heads, context=64)
    return Transformer(shape).double().eval()


def with_spans(net: Transformer, spans, ramp: int, max_span: int) -> list[AdaptiveSpan]:
    """Put layers with these spans `[layers, heads]` into the model."""
    layers = [AdaptiveSpan(len(row), max_span, ramp).double() for row in spans]
    for i, (layer, row) in enumerate(zip(layers, spans, strict=True)):
        layer.held.data = torch.tensor(row, dtype=torch.float64) / max_span
        surgery.set_attend(net, i, layer)
    return layers


@settings(max_examples=15)
@given(PROBLEMS)
def test_a_layer_attends_as_the_reference_and_so_do_its_gradients(case):
    layer = AdaptiveSpan(len(case.span), case.limit, case.ramp, speed=3.0).double()
    layer.held.data = torch.from_numpy(case.span) / (3 * case.limit)
    span = np.minimum(layer.span().detach().numpy(), case.limit)  # rounded
    case = Spanned(replace(case.problem, scale=None), span, case.ramp, case.max_span)  # 1/√D, as in the model
    tensors = [torch.from_numpy(x).requires_grad_() for x in case.arrays]
    out = layer(*tensors)
    expected = book.span_attention(*case.arrays, span, case.ramp, case.max_span)[0]
    assert_close(out.detach(), expected, case.problem)
    found = torch.autograd.grad(out, [*tensors, layer.held], torch.from_numpy(case.problem.dout))
    dq, dk, dv, dspan = gradients_by_autograd(case)
    for gradient, truth in zip(found, (dq, dk, dv, 3 * case.limit * dspan), strict=True):
        assert_close(gradient, truth, case.problem)


@torch.no_grad()
@settings(max_examples=12)
@given(st.sampled_from([4, 2, 1]), st.integers(0, 99), st.integers(1, 30), st.sampled_from([1, 2, 7]))
def test_a_trimmed_cache_decodes_what_the_whole_one_does(kv_heads, seed, prompt, step):
    net, rng = model(kv_heads), np.random.default_rng(seed)
    layers = with_spans(net, rng.integers(0, 20, (2, 4)), 3, 64)
    tokens = torch.from_numpy(rng.integers(0, 32, (2, 40)))
    trimmed = chapter.trimmed_cache(net, layers, batch=2)
    expected, found = net(tokens), [net(tokens[:, :prompt], trimmed)]
    for start in range(prompt, 40, step):
        found.append(net(tokens[:, start : start + step], trimmed))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **tolerance(torch.float64, 64))
    assert len(trimmed) == 40
    rows = book.keys_read(chapter.learnt(layers), 3, 64).reshape(2, kv_heads, -1).max(axis=2)
    assert trimmed.nbytes() == 2 * 2 * 6 * 8 * np.minimum(rows, 40).sum()  # keys and values, batch 2, D 6, float64


def test_trimming_changes_no_logit_and_no_token():
    net = model()
    layers = with_spans(net, [[0, 3, 7.5, 1], [20, 0, 2, 5]], 4, 64)
    tokens = torch.randint(0, 32, (60,), generator=torch.Generator().manual_seed(1))
    difference, held = chapter.trimming(net.float(), [layer.float() for layer in layers], tokens)
    assert difference < 1e-5 and held < 0.25
    whole = generate(net, tokens[None, :9], 50)
    assert torch.equal(whole, generate(net, tokens[None, :9], 50, cache=chapter.trimmed_cache(net, layers)))


@torch.no_grad()
def test_a_trimmed_cache_goes_back_as_far_as_it_can():
    net = model()
    layers = with_spans(net, [[0, 3, 2, 1], [9, 0, 2, 5]], 4, 64)
    tokens = torch.randint(0, 32, (1, 30), generator=torch.Generator().manual_seed(1))
    cache, expected = chapter.trimmed_cache(net, layers), net(tokens)
    net(tokens[:, :3], cache)
    cache.truncate(1)  # nothing was cut off yet
    net(tokens[:, 1:20], cache)
    cache.truncate(19)
    found = net(tokens[:, 19:], cache)
    torch.testing.assert_close(found, expected[:, 19:], **tolerance(torch.float64, 64))
    for length in (28, 31, -1):
        with pytest.raises(ValueError, match=f"cannot truncate to {length}: 30 positions"):
            cache.truncate(length)
    cache.truncate(29)


def test_a_trimmed_cache_refuses_what_does_not_fit():
    config = model(2).config
    cache = TrimmedCache(config, [[3, 4], [5, 6]], batch=2)
    k = torch.ones(2, 2, 3, 6)
    for bad in ((k[:1], k[:1]), (k[:, :1], k[:, :1]), (k[..., :4], k[..., :4]), (k, k[:, :, :2])):
        with pytest.raises(ValueError, match="k and v must be"):
            cache.update(0, *bad)
    assert cache.lengths == [0, 0]
    for rows in ([[3, 4]], [[3], [4]], [[3, 0], [1, 1]]):
        with pytest.raises(ValueError, match="rows must be positive, 2 × 2"):
            TrimmedCache(config, rows)
    with pytest.raises(ValueError, match="ramp must be at least 1"):
        AdaptiveSpan(4, 64, 0)


def test_a_penalty_shrinks_spans_and_none_leaves_them():
    stream = torch.randint(0, 32, (400,), generator=torch.Generator().manual_seed(1))
    means = []
    for penalty in (0.0, 1.0):
        net = model().float()
        layers = chapter.learn_spans(net, stream, 8, penalty, 24, ramp=4, seed=3)
        spans = chapter.learnt(layers)
        assert spans.shape == (2, 4) and ((spans >= 0) & (spans <= 24)).all()
        assert net.blocks[1].attention.attend is layers[1]
        means.append(spans.mean())
    assert means[1] < 12 < means[0]
    for options in ({"penalty": -1.0}, {"penalty": float("nan")}, {"steps": 0}, {"ramp": 0}):
        with pytest.raises(ValueError):
            chapter.learn_spans(model().float(), stream, **{"steps": 2, "penalty": 0.1, "length": 24} | options)


def test_the_same_seed_learns_the_same_spans():
    stream = torch.randint(0, 32, (400,), generator=torch.Generator().manual_seed(1))
    first, second = (chapter.learnt(chapter.learn_spans(model().float(), stream, 3, 0.1, 24, 4, seed=2)) for _ in "ab")
    np.testing.assert_array_equal(first, second)


def test_run_reports_spans_and_what_they_cost():
    net = model().float()
    stream = torch.randint(0, 32, (2000,), generator=torch.Generator().manual_seed(1))
    lab = SimpleNamespace(model=model_of(net), streams=(stream, stream), train_stream=stream, full=False)
    args = argparse.Namespace(steps=3, penalty=1.0, ramp=4, length=24, seed=0)
    report = chapter.demonstrate(lab, args)
    assert report["perplexity before"] == evaluate.perplexity(net, chapter.texts(lab, 24), batch=4)
    assert len(report["spans of layer 0"].split()) == 4 and 0 < report["share of keys read"] <= 1


def model_of(net: Transformer):
    """What a lab's `model` does."""

    def make() -> Transformer:
        copy = model().float()
        copy.load_state_dict(net.state_dict())
        return copy

    return make


@torch.no_grad()
def test_decoding_reads_the_whole_text_token_by_token():
    net = model()
    tokens = torch.arange(20) % 32
    logits = chapter.decoded(net, tokens, 12, KVCache(net.config, dtype=torch.float64))
    torch.testing.assert_close(logits, net(tokens[None])[0, 12:], **tolerance(torch.float64, 64))


@pytest.mark.parametrize(
    ("longest", "kept"),
    [(0, 64), (32, 64), (32.5, 128), (96.5, 192), (159.1, 192), (160, 192), (160.5, 256), (256, 256)],
)
def test_a_cache_is_trimmed_in_steps_and_keeps_what_is_read(longest, kept):
    assert chapter.trimmed_length(np.array([0.0, longest]), 32, 256) == kept
    assert chapter.trimmed_length(np.array([0.0, longest]), 32, 256, 1) == book.keys_read(np.array(longest), 32, 256)


def test_words_of_refusals():
    with pytest.raises(ValueError, match="span must be from 0 to max_span=5, got"):
        chapter.keys_read(np.array([6.0]), 4, 5)
    with pytest.raises(ValueError, match="ramp and max_span must be positive integers, got 0 and 5"):
        chapter.keys_read(np.array([1.0]), 0, 5)
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        chapter.trimmed_length(np.array([1.0]), 4, 5, 0)
    for arrays, options, error in refusals():
        with pytest.raises(error, match=r"must|need"):
            chapter.span_attention(**arrays, **options)


# --- the kernels ---


@pytest.mark.kernel
@settings(max_examples=max(settings.default.max_examples // 4, 7))
@given(SMALL, DTYPES, TILES, TILES, PLACES)
def test_backward_kernels_are_the_reference(case, dtype, block_q, block_k, places):
    forward = book.span_attention(*case.arrays, case.span, **case.options())
    dout, q, k, v, out = map(on_device, (case.problem.dout, *case.arrays, forward[0]), [dtype] * 5, places)
    lse, span = (on_device(x, torch.float32) for x in (forward[1], case.span))
    rounded = (out.double().cpu().numpy(), lse.double().cpu().numpy())  # what the kernel is given, no more
    expected = book.span_attention_backward(case.problem.dout, *case.arrays, *rounded, case.span, **case.options())
    found = fast.span_attention_backward(
        dout, q, k, v, out, lse, span, **case.options(), block_q=block_q, block_k=block_k
    )
    for gradient, truth in zip(found[:3], expected[:3], strict=True):
        assert gradient.dtype == dtype
        assert_kernel_close(gradient, truth, case.problem)
    assert found[3].dtype == torch.float32
    assert_kernel_close(found[3], expected[3], case.problem)


@pytest.mark.kernel
def test_gradients_flow_through_the_kernel_to_spans():
    case = spanned("normal", 8, HEADS[4], 17, 5, 16, 4, None)
    leaves = [torch.from_numpy(x).float().to(DEVICE).requires_grad_() for x in (*case.arrays, case.span)]
    out, lse = fast.span_attention(*leaves, 4)
    assert not lse.requires_grad
    dout = torch.from_numpy(case.problem.dout).float().to(DEVICE)
    gradients = torch.autograd.grad(out, leaves, dout.transpose(1, 2).contiguous().transpose(1, 2))
    for gradient, expected in zip(gradients, gradients_by_autograd(case), strict=True):
        np.testing.assert_allclose(gradient.cpu(), expected, **tolerance(torch.float32, 44, 8))


@pytest.mark.kernel
def test_a_span_that_is_nan_gives_nan_and_one_too_long_is_cut():
    case = spanned("normal", 8, HEADS[1], 5, 5, 16, 4, 8)
    q, k, v = (on_device(x, torch.float32) for x in case.arrays)
    spans = [on_device(np.array(span), torch.float32) for span in ([np.nan, 3.0], [100.0, 3.0])]
    broken, cut = (fast.span_attention(q, k, v, span, 4, 8)[0].cpu() for span in spans)
    assert broken[:, 0].isnan().all() and torch.equal(broken[:, 1], cut[:, 1])
    expected = book.span_attention(*case.arrays, np.array([8.0, 3.0]), 4, 8)[0]
    np.testing.assert_allclose(cut, expected, **tolerance(torch.float32, 10))


@pytest.mark.kernel
def test_kernel_refuses():
    good = {name: torch.ones(shape, device=DEVICE) for name, shape in
            {"q": (1, 4, 3, 8), "k": (1, 2, 5, 8), "v": (1, 2, 5, 8), "span": (4,)}.items()}  # fmt: skip
    refused = [
        ({"k": torch.ones(1, 2, 2, 8, device=DEVICE), "v": torch.ones(1, 2, 2, 8, device=DEVICE)}, "at least q's 3"),
        ({"span": torch.ones(2, device=DEVICE)}, r"span must be \[4\]"),
        ({"span": torch.ones(8, device=DEVICE)[::2]}, "span must be contiguous"),
        ({"ramp": 0}, "ramp must be"),
        ({"ramp": 1.5}, "ramp must be"),
        ({"max_span": 0}, "max_span must be"),
        ({"scale": -1.0}, "scale must be"),
        ({"block_q": 24}, "block_q must be"),
    ]
    for change, words in refused:
        with pytest.raises(ValueError, match=words):
            fast.span_attention(**good | change)
    with pytest.raises(TypeError, match="span must have dtype"):
        fast.span_attention(**good | {"span": torch.ones(4, dtype=torch.float64, device=DEVICE)})


@pytest.mark.kernel
def test_what_bench_compares_with_is_the_same():
    from kernels.shared import spans

    device = torch.device(DEVICE)
    q, k, v, dout = (torch.randn(1, heads, 48, 16, device=device) for heads in (4, 2, 2, 4))
    span = torch.tensor(spans.spread(4, 48), device=device)
    out, lse = fast.span_attention(q, k, v, span)
    for expected in (spans.masked(q, k, v, span), spans.sdpa_with_mask(*spans.with_mask(q, k, v, span))):
        torch.testing.assert_close(out, expected, **tolerance(torch.float32, 48))
    found = fast.span_attention_backward(dout, q, k, v, out, lse, span)
    for gradient, expected in zip(found, spans.gradients(dout, q, k, v, out, lse, span), strict=True):
        torch.testing.assert_close(gradient, expected, **tolerance(torch.float32, 96, 8))
    pairs = (book.soft_mask(book.distances(48, 48), span.cpu().numpy()[:, None, None], 32, 48) > 0).sum()
    assert spans.pairs_read(4, 48) == pairs
