"""Linformer in the model: torch against the reference, sharing, gradients, the leak, measures, the kernel's wrapper."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from chapters.attention import linformer
from chapters.shared import projected_attention as projected
from chapters.shared.projected_attention import BlockwiseAttention, SlotAttention
from minitfm.config import Config
from minitfm.model import Transformer, causal_attention
from tests.attention.linformer_problems import HEADS, assert_close, attended, drawn_mask, make, on_device, slots_of
from tests.conftest import DEVICE, KERNEL_DTYPES, kernel, tolerance

fast = kernel("attention.linformer")


def model(kv_heads: int = 2) -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(32, dim=32, hidden_dim=32, layers=2, heads=4, kv_heads=kv_heads, context=64)).eval()


def tensors(*arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(x) for x in arrays)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_torch_is_the_reference(heads, own, share):
    problem = make("normal", 0, 5, 9, 6, 3, spare=2, own=own, heads=heads)
    q, k, v, e, f = problem.arrays()
    module = SlotAttention(*tensors(*((e,) if share else (e, f)))).double()
    expected = linformer.linformer_attention(q, k, v, e, None if share else f)
    np.testing.assert_allclose(module(*tensors(q, k, v)).detach(), expected, **tolerance(np.float64, 9))
    e, f = e[..., :4], f[..., :4]
    module = BlockwiseAttention(*tensors(*((e,) if share else (e, f)))).double()
    expected = linformer.blockwise_attention(q, k, v, e, None if share else f)
    np.testing.assert_allclose(module(*tensors(q, k, v)).detach(), expected, **tolerance(np.float64, 9))
    assert len(list(module.parameters())) == 2 - share


def test_modules_refuse_in_words():
    e = torch.ones(3, 8)
    with pytest.raises(ValueError, match="f like it"):
        SlotAttention(e, e[:2])
    with pytest.raises(ValueError, match=r"\[slots, L\]"):
        BlockwiseAttention(e[0])
    with pytest.raises(ValueError, match="at most 8"):
        SlotAttention(e)(*torch.ones(3, 1, 1, 9, 4))


def test_one_module_or_one_a_layer_is_trained_with_the_model():
    shared = SlotAttention(*linformer.as_tensors(4, 16))
    for make_one, count in ((lambda: shared, 2), (lambda: SlotAttention(*linformer.as_tensors(4, 16, 2)), 4)):
        network = model()
        plain = {id(p) for p in network.parameters()}
        projected.set_everywhere(network, make_one)
        network(torch.arange(16)[None]).logsumexp(-1).sum().backward()
        own = [p for p in network.parameters() if id(p) not in plain]
        assert len(own) == count and all(p.grad is not None and p.grad.abs().sum() > 0 for p in own)


@pytest.mark.parametrize("T", [8, 3])
def test_influence_shows_who_peeks(T):
    q, k, v = (torch.from_numpy(x) for x in make("normal", 0, T, 8, 4, 1).arrays()[:3])
    later = torch.ones(T, 8, dtype=torch.bool).triu(8 - T + 1)
    peeking, honest = (
        kind(*linformer.as_tensors(2, n)).double() for kind, n in ((SlotAttention, 8), (BlockwiseAttention, 4))
    )
    with torch.no_grad():
        assert projected.influence(peeking, q, k, v).min() > 0
        for attend in (causal_attention, honest):
            changes = projected.influence(attend, q, k, v)
            assert (changes[later] == 0).all() and (changes[~later] > 0).all()


def test_only_a_causal_model_has_one_perplexity():
    tokens, positions = torch.randint(0, 32, (3, 20), generator=torch.Generator().manual_seed(0)), [1, 8, 9, 19]
    network = model()
    at_once, from_the_past = projected.perplexities(network, tokens, positions)
    assert at_once == pytest.approx(from_the_past, rel=1e-5)
    for make_one, same in (
        (lambda: BlockwiseAttention(*linformer.as_tensors(2, 4)), True),
        (lambda: SlotAttention(torch.eye(19) * 3), False),
    ):
        projected.set_everywhere(network, make_one)
        at_once, from_the_past = projected.perplexities(network, tokens, positions)
        assert (at_once == pytest.approx(from_the_past, rel=1e-5)) is same


def test_fitting_brings_the_output_nearer():
    q, k, v = torch.randn(3, 6, 2, 12, 4, generator=torch.Generator().manual_seed(0)).unbind()
    attention, exact = SlotAttention(*linformer.as_tensors(3, 12, 2)), projected.without_mask(q, k, v)
    before = projected.error(attention(q, k, v), exact)
    projected.fit(attention, (q, k, v), steps=60, seed=0, rate=1e-2)
    assert projected.error(attention(q, k, v), exact) < before
    assert projected.error(exact, exact) == 0 and projected.error(2 * exact, exact) == pytest.approx(1)


def test_nothing_of_that_rank_is_nearer():
    weights = np.random.default_rng(0).normal(size=(2, 7, 9))
    best = linformer.nearest_of_rank(weights, 3)
    assert (np.linalg.matrix_rank(best) == 3).all()
    left = np.linalg.norm(weights - best, axis=(1, 2))
    np.testing.assert_allclose(left**2, (np.linalg.svd(weights, compute_uv=False)[:, 3:] ** 2).sum(-1))
    np.testing.assert_allclose(linformer.nearest_of_rank(weights, 7), weights)


def test_projections_to_start_from():
    means = linformer.segment_means(3, 8)
    np.testing.assert_allclose(means.sum(axis=1), 1)
    assert ((means > 0).sum(axis=0) == 1).all()
    np.testing.assert_array_equal(linformer.segment_means(4, 4), np.eye(4))
    assert linformer.gaussian(50, 400).std() == pytest.approx(50**-0.5, rel=0.02)
    np.testing.assert_array_equal(linformer.gaussian(2, 3, 1), linformer.gaussian(2, 3, 1))
    for slots in (0, 9):
        with pytest.raises(ValueError, match="slots must be"):
            linformer.segment_means(slots, 8)


def test_the_crossover_is_where_the_counts_cross():
    for slots in (1, 7, 256):
        at = linformer.crossover(slots)
        less = [
            linformer.linformer_operations(n, n, 8, slots) < linformer.softmax_operations(n, n, 8) for n in (at - 1, at)
        ]
        assert less == [False, True]


@pytest.mark.parametrize("more", [[], ["--block", "0", "--slots", "12"]])
def test_run_offers_both_forms(more):
    parser = argparse.ArgumentParser()
    linformer.options(parser)
    network = model()
    projected.set_everywhere(network, lambda: linformer.seams(parser.parse_args(more))["attend"])
    tokens = torch.arange(32).roll(3)[None]
    with torch.no_grad():
        whole, part = network(tokens)[:, :10], network(tokens[:, :10])
    assert torch.allclose(whole, part, atol=1e-5) is not bool(more)


@pytest.mark.parametrize("options", [{"block": -1, "slots": 2}, {"block": 4, "slots": 5}, {"block": 4, "slots": 0}])
def test_run_refuses(options):
    with pytest.raises(ValueError, match="must be"):
        linformer.seams(argparse.Namespace(**options))


# --- the kernel's wrapper -----------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_is_the_reference(dtype, masked, own):
    problem = make("normal", 4, 19, 33, 24, 5, spare=3, own=own, heads=(1, 2, 2))
    q, k, v = (on_device(x.swapaxes(1, 2), dtype).transpose(1, 2) for x in problem.arrays()[:3])  # as projections lie
    e, f = (on_device(x, dtype) for x in (problem.e, problem.f))
    mask = drawn_mask(problem.k, 0) if masked else None
    given = None if mask is None else torch.from_numpy(mask).to(DEVICE)
    for share in (False, True):
        found = fast.linformer_attention(q, k, v, e, None if share else f, given, 0.3)
        expected = linformer.linformer_attention(*problem.arrays()[:4], None if share else problem.f, mask, 0.3)
        assert_close(found.double().cpu().numpy(), expected, dtype, scores=problem.largest_score)


@pytest.mark.kernel
def test_many_slots_go_tile_by_tile():
    problem = make("normal", 5, 17, 9, 16, 130)
    q, k, v, e, f = (on_device(x, torch.float32) for x in problem.arrays())
    expected = attended(problem.q, slots_of(problem.k, problem.e), slots_of(problem.v, problem.f))
    found = fast.linformer_attention(q, k, v, e, f)
    assert_close(found.double().cpu().numpy(), expected, np.float32, scores=problem.largest_score)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k": (1, 2, 5, 8)}, "k and v must have one shape"),
        ({"q": (1, 3, 5, 16)}, "Hkv dividing"),
        ({"e": (3, 4)}, "L at least 5"),
        ({"e": (3, 3, 5)}, "e must be"),
        ({"f": (2, 6)}, "e and f must have one shape"),
        ({"f": (6,)}, "f must be"),
        ({"mask": (1, 6)}, "mask must be"),
        ({"q": (1, 2, 5, 200), "k": (1, 2, 5, 200), "v": (1, 2, 5, 200)}, "at most 128"),
    ],
)
def test_kernel_refuses(changed, words):
    kv = (1, 2, 5, 16)
    shapes = {"q": kv, "k": kv, "v": kv, "e": (3, 6), "f": (3, 6), "mask": (1, 5)} | changed
    made = {name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()}
    made["mask"] = made["mask"].bool()
    with pytest.raises(ValueError, match=words):
        fast.linformer_attention(**made)


@pytest.mark.kernel
def test_kernel_refuses_dtypes_layouts_and_options():
    x, e = torch.zeros(1, 2, 5, 16, device=DEVICE), torch.zeros(3, 6, device=DEVICE)
    with pytest.raises(TypeError, match="e must have dtype"):
        fast.linformer_attention(x, x, x, e.half())
    with pytest.raises(TypeError, match="mask must have dtype"):
        fast.linformer_attention(x, x, x, e, None, torch.ones(1, 5, device=DEVICE))
    with pytest.raises(ValueError, match="e must be contiguous"):
        fast.project(x, e.repeat(1, 2)[:, ::2])
    with pytest.raises(ValueError, match="runs must be"):
        fast.project(x, e, None, 0)
    with pytest.raises(ValueError, match="D must be"):
        fast.project(torch.zeros(1, 2, 5, 200, device=DEVICE), e)
    with pytest.raises(ValueError, match="D must be"):
        fast.attend_slots(*torch.zeros(3, 1, 2, 5, 200, device=DEVICE))
