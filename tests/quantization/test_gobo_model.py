"""Around GOBO: the layer that holds a codebook, what is counted of it, what `run` does to a model, and the claim."""

from __future__ import annotations

import argparse
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import gobo as chapter
from chapters.quantization.gobo import Codebook, CodebookLinear, gobo, quantize_model, stored_bits
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, tolerance


def held(rows: int = 6, columns: int = 64, bits: int = 3, seed: int = 0) -> Codebook:
    """A codebook with a few outliers."""
    return gobo(np.random.default_rng(seed).normal(0, 0.5, (rows, columns)), bits, -4.0)


class TestLayer:
    @given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([(5, 64), (6, 70), (1, 33)]))
    def test_computes_what_the_dequantized_weights_do(self, seed, bits, shape):
        rng = np.random.default_rng(seed)
        codebook = gobo(rng.normal(size=shape), bits, -2.5)
        x, bias = rng.normal(size=(2, 3, shape[1])), torch.from_numpy(rng.normal(size=shape[0]))
        found = CodebookLinear(codebook, bias, torch.float64)(torch.from_numpy(x))
        expected = x @ codebook.dequantize().T + bias.numpy()
        np.testing.assert_allclose(found.numpy(), expected, **tolerance(np.float64, shape[1], 10))

    @pytest.mark.kernel  # on a GPU it is called
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_serves_every_precision_and_any_order_of_axes(self, dtype):
        codebook, bias = held(), torch.ones(6, dtype=torch.float32)
        x = torch.from_numpy(np.random.default_rng(1).standard_normal((64, 2, 3))).to(DEVICE, dtype).permute(2, 1, 0)
        found = CodebookLinear(codebook, bias.to(DEVICE)).to(DEVICE)(x)
        expected = x.double().cpu().numpy() @ codebook.dequantize().T + 1
        assert found.dtype is dtype
        close = tolerance(torch.float16 if dtype is not torch.bfloat16 else dtype, 64)  # as centroids are stored
        np.testing.assert_allclose(found.double().cpu().numpy(), expected, **close)

    def test_passes_gradients_to_its_input(self):
        x = torch.randn(2, 64, device=DEVICE, requires_grad=True)
        (gradient,) = torch.autograd.grad(CodebookLinear(held(), dtype=torch.float32).to(DEVICE)(x).sum(), x)
        expected = np.tile(held().dequantize().sum(0), (2, 1))
        np.testing.assert_allclose(gradient.cpu().numpy(), expected, **tolerance(torch.float32, 6))

    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    @pytest.mark.parametrize("shape", [(1, 40), (6, 64), (7, 33)])
    def test_bits_are_counted_to_the_last_byte(self, bits, shape):
        codebook = held(*shape, bits)
        buffers = sum(buffer.nbytes for buffer in CodebookLinear(codebook).buffers())
        assert codebook.bits_per_weight() * codebook.codes.size == pytest.approx(8 * buffers)

    def test_bits_of_a_large_layer_are_hardly_more_than_those_of_the_codes(self):
        outliers = 4096 * 8
        start = np.arange(0, outliers + 1, 8)
        codebook = Codebook(np.zeros((4096, 4096), np.uint8), np.zeros(8), start, start, np.zeros(outliers))
        assert codebook.bits_per_weight() == pytest.approx(3 + 32 * 8 / 4096 + 32 / 4096, abs=1e-4)

    def test_refuses_what_it_cannot_hold(self):
        wide = Codebook(
            np.zeros((1, 2**15 + 1), np.uint8), np.arange(2.0), np.zeros(2, int), np.zeros(0, int), np.ones(0)
        )
        for codebook, complaint in (
            (wide, "at most 32768 columns, got 32769"),
            (held(bits=5), "bits must be an integer from 1 to 4, got 5"),
            (gobo(1e6 * np.random.default_rng(0).normal(size=(8, 8)), 3, -np.inf), r"finite in torch.float16, .*e\+06"),
        ):
            with pytest.raises(ValueError, match=complaint):
                CodebookLinear(codebook)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=40, dim=32, hidden_dim=48, layers=1, heads=2)).eval()


class TestInTheModel:
    def test_a_model_of_codebooks_says_what_the_rounded_one_does(self, model):
        tokens = torch.randint(40, (4, 16))
        done = quantize_model(model, surgery.linears(model), bits=3)
        with torch.no_grad():
            expected = model(tokens)
            for name, codebook in done.items():
                surgery.replace(model, name, CodebookLinear(codebook, dtype=torch.float32))
            torch.testing.assert_close(model(tokens), expected, **tolerance(torch.float32, 64))

    @pytest.mark.parametrize("extra", [[], ["--bits", "5"], ["--threshold", "-2.5"], ["--centroids", "linear"]])
    def test_run_changes_the_blocks_alone_and_reports_what_they_take(self, model, extra):
        args, before = parsed(extra), copy.deepcopy(model)
        report = chapter.apply(model, torch.zeros(0, 16), args)
        done = []
        for layer, old in zip(surgery.linears(model).values(), surgery.linears(before).values(), strict=True):
            done.append(gobo(old.weight.detach().numpy(), args.bits, args.threshold, args.centroids))
            np.testing.assert_array_equal(layer.weight.detach().numpy(), done[-1].dequantize().astype(np.float32))
        assert report["bits per weight"] == pytest.approx(stored_bits(done)) and report["bits per weight"] > args.bits
        assert report["outliers, %"] == pytest.approx(
            100 * sum(len(codebook.value) for codebook in done) / sum(codebook.codes.size for codebook in done)
        )
        assert torch.equal(model.embedding.weight, before.embedding.weight)

    def test_run_quantizes_the_embedding_if_asked(self, model):
        report = chapter.apply(model, torch.zeros(0, 16), parsed(["--embedding", "--threshold=-inf"]))
        assert len(model.embedding.weight.unique()) == 8
        assert report["bits per weight, embedding"] == pytest.approx(3 + (16 * 8 + 32 * 41) / (40 * 32))


def parsed(options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chapter.options(parser)
    return parser.parse_args(options)


def bench(model: Transformer, rises: dict[str, float]) -> SimpleNamespace:
    """As much of a lab as the claim asks for; perplexity tells rivals apart by what they leave of the weights."""

    def perplexity(changed: Transformer) -> float:
        weights, plain = (next(iter(surgery.linears(each).values())).weight for each in (changed, model))
        for rival, (threshold, centroids, _) in chapter.RIVALS.items():
            for bits in (3, 4):
                values = gobo(plain.detach().numpy(), bits, threshold, centroids).dequantize()
                if np.array_equal(weights.detach().numpy(), values.astype(np.float32)):
                    return 20.0 + rises[rival]
        raise AssertionError("the model was changed in another way")

    return SimpleNamespace(
        full=False, seeds=(0,), base_perplexity=20.0, model=lambda: copy.deepcopy(model), perplexity=perplexity
    )


RISES = {"GOBO": 1.0, "K-means": 0.9, "even centroids": 2.0, "plain rounding": 3.0}


class TestClaim:
    def test_holds_where_gobo_loses_less_and_stops_sooner(self, model):
        made = chapter.claim(bench(model, RISES))
        assert made.holds and made.numbers["moves, GOBO"] < made.numbers["moves, K-means"]
        assert made.numbers["bits, plain rounding 3 bits"] == 3 < made.numbers["bits, GOBO 3 bits"]
        assert "by 1.00, plain rounding of whole layers by 3.00" in made.sentence and "(rise 0.90)" in made.sentence

    def test_does_not_hold_if_plain_rounding_is_as_good(self, model):
        assert not chapter.claim(bench(model, RISES | {"plain rounding": 1.0})).holds

    def test_does_not_hold_if_k_means_is_as_quick(self, model, monkeypatch):
        monkeypatch.setitem(chapter.METHODS, "kmeans", chapter.l1_centroids)
        assert not chapter.claim(bench(model, RISES)).holds

    def test_does_not_hold_if_the_error_is_larger(self, model, monkeypatch):
        monkeypatch.setattr(
            chapter, "searches", lambda lab, method, bits: [[5.0, 4.0] if method == "l1" else [3.0] * 9]
        )
        assert not chapter.claim(bench(model, RISES)).holds
