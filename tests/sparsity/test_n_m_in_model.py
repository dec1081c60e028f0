"""N:M sparsity in the model: the compressed layer, `run` and the claim."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch
from torch import nn

from chapters.shared.pruned_layers import prune_each
from chapters.sparsity import n_m
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, tolerance


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=50, dim=32, hidden_dim=64, layers=2, heads=2, context=16)).eval()


def test_a_compressed_model_computes_what_the_pruned_one_does(model):
    pruned_model, tokens = copy.deepcopy(model), torch.arange(16)[None]
    prune_each(pruned_model, n_m.n_m_mask)
    expected = pruned_model(tokens)
    assert not torch.allclose(expected, model(tokens))
    n_m.compress_model(pruned_model)
    torch.testing.assert_close(pruned_model(tokens), expected, rtol=0, atol=0)
    assert not surgery.linears(pruned_model)


def pruned_linear(dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(32, 6).to(DEVICE, dtype)
    mask = torch.from_numpy(n_m.n_m_mask(linear.weight.detach().double().cpu().numpy()))
    linear.weight.data.masked_fill_(~mask.to(DEVICE), 0)
    return linear


@pytest.mark.kernel  # on a GPU the 16-bit layers call it
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_sparse_layer_computes_what_the_dense_one_does_from_its_share_of_the_bytes(dtype):
    linear, x = pruned_linear(dtype), torch.randn(3, 2, 32, device=DEVICE, dtype=dtype).transpose(0, 1)
    layer = n_m.SparseLinear(linear)
    assert torch.equal(layer.weight(), linear.weight)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x), **tolerance(dtype, 32))
    stored = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert stored == 6 * 32 * (dtype.itemsize / 2 + 1 / 8)


def test_a_sparse_layer_passes_gradients_to_its_input():
    linear, x = pruned_linear(torch.float16), torch.randn(2, 32, device=DEVICE, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad(n_m.SparseLinear(linear)(x).sum(), x)
    torch.testing.assert_close(gradient, linear.weight.sum(0).expand(2, -1), **tolerance(torch.float16))


def test_a_layer_that_is_not_2_of_4_is_refused(model):
    with pytest.raises(ValueError, match="not 2:4"):
        n_m.compress_model(copy.deepcopy(model))


@pytest.mark.parametrize(("n", "m", "bits"), [(2, 4, 17), (1, 4, 8.5), (4, 8, 17.5), (1, 2, 16.5)])
def test_run_prunes_the_model_and_counts_bits(model, n, m, bits):
    changed, parser = copy.deepcopy(model), argparse.ArgumentParser()
    n_m.options(parser)
    report = n_m.apply(changed, torch.zeros(0, 16), parser.parse_args(["--n", str(n), "--m", str(m)]))
    assert report["bits per weight"] == bits
    for layer in surgery.linears(changed).values():
        assert (layer.weight != 0).unflatten(1, (-1, m)).sum(-1).unique().tolist() == [n]
    again = copy.deepcopy(model)
    assert n_m.apply(again, torch.zeros(0, 16), parser.parse_args(["--pattern", f"{n}:{m}"])) == report
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), changed.parameters(), strict=True))


class Bench:
    """As much of a lab as the claim asks for; `costs` are the perplexities that it measures, one after another."""

    full, seeds, validation, base_perplexity = False, (0, 1), torch.zeros(1, 128), 10.0

    def __init__(self, model: Transformer, costs: list[float]) -> None:
        self.pattern, self.weights, self.costs, self.measured = model, model.state_dict(), iter(costs), []

    def model(self) -> Transformer:
        return copy.deepcopy(self.pattern)

    def perplexity(self, model: Transformer) -> float:
        self.measured.append(torch.cat([layer.weight.flatten() for layer in surgery.linears(model).values()]))
        return next(self.costs)


def test_the_claim_holds_only_if_every_seed_shows_it(model):
    bench = Bench(model, [11, 12, 13, 14, 15, 16])
    claim = n_m.claim(bench)
    assert claim.holds and claim.numbers["perplexity, 2:4, 50% zeros"] == 13.5
    assert all(abs((weights == 0).double().mean() - 0.5) < 1e-3 for weights in bench.measured)
    assert torch.equal(bench.measured[0], bench.measured[1])  # zeros anywhere do not depend on the order …
    assert not torch.equal(bench.measured[2], bench.measured[3])  # … groups do
    assert not n_m.claim(Bench(model, [11, 12, 13, 17, 15, 16])).holds
