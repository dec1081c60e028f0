"""Transposable N:M in the model: both products from compressed weights, `run`, the claim, and what is refused."""

from __future__ import annotations

import argparse
import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chapters.sparsity import transposable
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, kernel, oracle, tolerance
from tests.sparsity.blocks import REFUSED
from tests.sparsity.drawn import CONTENTS, SEEDS, contents
from tests.sparsity.test_n_m_in_model import Bench

fast = kernel("sparsity.transposable")


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=50, dim=32, hidden_dim=64, layers=2, heads=2, context=16)).eval()


@pytest.mark.parametrize(("function", "words"), [(name, words) for name, cases in REFUSED.items() for words in cases])
def test_the_reference_names_the_fault(function, words):
    with pytest.raises(ValueError, match=words):
        getattr(oracle("sparsity.transposable"), function)(*REFUSED[function][words])


@pytest.mark.kernel
def test_the_kernel_refuses():
    weight, table = torch.ones(8, 8, device=DEVICE), fast.two_of_four(torch.device(DEVICE))
    for arguments, words in [
        ((weight[0], table), "must be \\[N, K\\]"),
        ((weight[:6], table), "6 by 8"),
        ((torch.ones(8, 6, device=DEVICE), table), "8 by 6"),
        ((weight, table.flatten(1)), "patterns must be"),
        ((weight, table[:0]), "patterns must be"),
        ((weight, table.repeat(2, 1, 1)), "patterns must be"),
        ((weight.repeat(2, 1)[::2], table), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=words):
            fast.best_mask(*arguments)
    for arguments in [(weight.double(), table), (weight, table.byte())]:
        with pytest.raises(TypeError, match="dtype"):
            fast.best_mask(*arguments)


def test_kernel_and_chapter_list_the_same_masks():
    np.testing.assert_array_equal(fast.two_of_four(torch.device("cpu")), transposable.transposable_patterns(2, 4))


@given(st.sampled_from(CONTENTS), st.integers(1, 3), st.integers(1, 3), st.sampled_from([(2, 4), (4, 8)]), SEEDS)
def test_blocks_go_there_and_back_and_the_transpose_obeys(kind, high, wide, pattern, seed):
    n, m = pattern
    weight = contents(kind, (high * m, wide * m), seed)
    blocks = transposable.to_blocks(weight, m)
    np.testing.assert_array_equal(transposable.from_blocks(blocks, weight.shape, m), np.abs(weight))
    mask = transposable.transposable_mask(weight, n, m)
    assert transposable.obeys(mask, n, m) and transposable.obeys(mask.T, n, m)


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5), SEEDS)
def test_the_gradient_of_the_input_comes_from_the_compressed_transpose(high, wide, tokens, seed):
    generator = np.random.default_rng(seed)
    weight, gradient = generator.normal(size=(16 * high, 16 * wide)), generator.normal(size=(tokens, 16 * high))
    sparse = np.where(transposable.transposable_mask(weight), weight, 0)
    found = transposable.input_gradient(gradient, sparse)
    np.testing.assert_allclose(found, gradient @ sparse, **tolerance(np.float64, len(weight), scale=10))


def test_a_mask_for_rows_only_has_no_sparse_backward_product():
    weight = np.random.default_rng(0).normal(size=(16, 16))
    rows_only = np.where(oracle("sparsity.n_m").n_m_mask(weight), weight, 0)
    assert transposable.obeys(rows_only != 0, 2, 4) and not transposable.obeys(rows_only.T != 0, 2, 4)
    with pytest.raises(ValueError, match="not 2:4"):
        transposable.input_gradient(np.ones((1, 16)), rows_only)


@pytest.mark.kernel  # on a GPU the 16-bit layers call that of n_m
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_layer_computes_both_products_from_compressed_weights(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).to(DEVICE, dtype)
    mask = transposable.transposable_mask(linear.weight.double().numpy(force=True))
    linear.weight.data *= torch.from_numpy(mask).to(DEVICE)
    layer, x = transposable.TransposableLinear(linear), torch.randn(3, 2, 32, device=DEVICE, dtype=dtype)
    ours, plain = (x.clone().requires_grad_() for _ in range(2))
    gradient = torch.randn(3, 2, 48, device=DEVICE, dtype=dtype)
    out, expected = layer(ours), linear(plain)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(out, expected, **tolerance(dtype, 32))
    torch.testing.assert_close(ours.grad, plain.grad, **tolerance(dtype, 48))
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 2 * 32 * 48 * (dtype.itemsize / 2 + 1 / 8)
    linear.weight.data[0] = 1
    with pytest.raises(ValueError, match="not 2:4"):
        transposable.TransposableLinear(linear)


RUNS = [(["--steps", "2"], 14), (["--pattern", "4:8"], 14), (["--rows-only"], 0)]


@pytest.mark.parametrize(("asked", "turned"), RUNS)
def test_run_prunes_the_model_and_counts(model, asked, turned):
    changed, parser = copy.deepcopy(model), argparse.ArgumentParser()
    transposable.options(parser)
    args = parser.parse_args(asked)
    args.seed = 0
    report = transposable.apply(changed, torch.arange(48).view(3, 16), args)
    n, m = args.pattern
    assert report["bits per weight"] == {4: 17, 8: 17.5}[m]
    assert report[f"layers whose transpose is {n}:{m}"] == f"{turned} of 14"
    masks = [layer.weight.detach().numpy() != 0 for layer in surgery.linears(changed).values()]
    assert sum(transposable.obeys(mask.T, n, m) for mask in masks) == turned
    assert all(transposable.obeys(mask, n, m) for mask in masks)
    assert report["kept weights"] == f"{sum(mask.sum() for mask in masks)} of {sum(mask.size for mask in masks)}"


def test_run_refuses(model):
    with pytest.raises(ValueError, match="--steps"):
        transposable.apply(model, torch.zeros(1, 16), argparse.Namespace(steps=-1, pattern=(2, 4), rows_only=False))


# perplexities in the order of measuring, for two seeds: 1:2, 2:4 and 4:8, then the same both ways
@pytest.mark.parametrize(
    ("costs", "holds"),
    [
        ([90, 91, 50, 51, 40, 41, 95, 96, 60, 61, 45, 46], True),
        ([90, 91, 50, 62, 40, 41, 95, 96, 60, 61, 45, 46], False),  # plain 2:4 costs more once
        ([90, 91, 50, 51, 40, 41, 95, 96, 60, 61, 45, 62], False),  # 4:8 both ways costs more than 2:4 both ways once
        ([90, 91, 50, 51, 40, 47, 95, 96, 60, 61, 45, 46], False),  # plain 4:8 costs more than both ways once
    ],
)
def test_the_claim_holds_only_if_every_seed_shows_it(model, costs, holds):
    claim = transposable.claim(Bench(model, [float(cost) for cost in costs]))
    assert claim.holds == holds
    assert claim.numbers["perplexity, 2:4 both ways"] == 60.5
    assert claim.numbers["magnitude kept, 2:4 both ways"] < claim.numbers["magnitude kept, 2:4"]
    assert claim.numbers["bits of choice a weight, 2:4 both ways"] == pytest.approx(np.log2(90) / 16)
