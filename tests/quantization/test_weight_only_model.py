"""Around the weight-only product: the layer that holds packed weights, its plain quantizer, and its claim."""

from __future__ import annotations

import argparse
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import weight_only as chapter
from chapters.quantization.gptq import gptq, quantize_model, round_to_nearest
from chapters.quantization.weight_only import Quantized, WeightOnlyLinear, nearest_codes, stored_bits, use_packed
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, tolerance
from tests.quantization.problems import layers


def held(columns: int = 32, bits: int = 4, **changed) -> Quantized:
    """A one-row weight of ones in one group."""
    parts = {"codes": np.ones((1, columns), np.uint8), "scale": np.ones((1, 1)), "zero": np.zeros((1, 1))}
    return Quantized(**(parts | changed), group_of_column=np.zeros(columns, int), bits=bits)


class TestLayer:
    @given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4]), st.sampled_from([None, 32]), st.booleans())
    def test_computes_what_the_dequantized_weights_do(self, seed, bits, group_size, act_order):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((40, 64))
        quantized = gptq(rng.standard_normal((5, 64)), x.T @ x, bits, group_size, act_order=act_order)
        bias = torch.from_numpy(rng.standard_normal(5))
        found = WeightOnlyLinear(quantized, bias, torch.float64)(torch.from_numpy(x).unflatten(0, (2, 20)))
        expected = (x @ quantized.dequantize().T + bias.numpy()).reshape(2, 20, 5)
        np.testing.assert_allclose(found.numpy(), expected, **tolerance(np.float64, 64, 10))

    @pytest.mark.kernel  # on a GPU it is called
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_serves_every_precision_and_any_order_of_axes(self, dtype):
        rng = np.random.default_rng(0)
        quantized, bias = nearest_codes(rng.standard_normal((6, 64)), 32), torch.ones(6, dtype=torch.float32)
        x = torch.from_numpy(rng.standard_normal((64, 2, 3))).to(DEVICE, dtype).permute(2, 1, 0)
        found = WeightOnlyLinear(quantized, bias).to(DEVICE)(x)
        expected = x.double().cpu().numpy() @ quantized.dequantize().T + 1
        assert found.dtype is dtype
        np.testing.assert_allclose(found.double().cpu().numpy(), expected, **tolerance(dtype, 64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_passes_gradients_to_its_input(self, dtype):
        quantized = nearest_codes(np.random.default_rng(0).standard_normal((6, 64)), 32)
        x = torch.randn(2, 64, device=DEVICE, dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(WeightOnlyLinear(quantized).to(DEVICE)(x).sum(), x)
        expected = np.tile(quantized.dequantize().sum(0), (2, 1))
        np.testing.assert_allclose(gradient.double().cpu().numpy(), expected, **tolerance(dtype, 6))

    @pytest.mark.parametrize(
        ("quantized", "complaint"),
        [
            (held(bits=5), "got 5, 32"),
            (held(16), "got 4, 16"),
            (held(zero=np.full((1, 1), 7.5)), "zero must hold integers from 0 to 255, got 7.5 to 7.5"),
            (held(zero=np.full((1, 1), -1.0)), "got -1.0"),
            (held(zero=np.full((1, 1), 256.0)), "got 256.0"),
            (held(zero=np.full((1, 1), np.nan)), "got nan"),
            (held(scale=np.full((1, 1), 1e6)), r"scale must be finite in torch.float16, got up to 1e\+06"),
            (held(codes=np.full((1, 32), 16, np.uint8)), "codes must be from 0 to 15, got 16"),
        ],
    )
    def test_refuses_what_it_cannot_hold(self, quantized, complaint):
        with pytest.raises(ValueError, match=complaint):
            WeightOnlyLinear(quantized)


class TestNearestCodes:
    @given(layers(columns=(2, 16, 24)), st.sampled_from([None, 1, 2]))
    def test_takes_the_nearest_of_the_sixteen_values(self, layer, size):
        weight = np.clip(layer.weight, -1e5, 1e5)
        found = nearest_codes(weight, size)
        scale, zero = found.scale[:, found.group_of_column], found.zero[:, found.group_of_column]
        values = scale[..., None] * (np.arange(16) - zero[..., None])  # [out, in, 16]
        best = np.abs(values - weight[..., None]).min(axis=-1)
        errors = np.abs(found.dequantize() - weight)
        np.testing.assert_allclose(errors, best, rtol=1e-9, atol=1e-12 * np.abs(weight).max())
        assert (found.scale == found.scale.astype(np.float16)).all()

    def test_is_rounding_to_nearest_but_for_the_precision_of_the_scale(self):
        weight = np.random.default_rng(0).standard_normal((8, 96))
        found, expected = nearest_codes(weight, 32), round_to_nearest(weight, 4, 32)
        np.testing.assert_allclose(found.scale, expected.scale, rtol=2.0**-11)
        assert (found.codes == expected.codes).mean() > 0.99

    def test_small_weights_are_held_and_huge_ones_refused(self):
        tiny = np.array([[1e-9, -1e-9, 0.0], [0.0, 0.0, 0.0]])
        np.testing.assert_array_equal(nearest_codes(tiny).dequantize(), 0)
        with pytest.raises(ValueError, match="too large for float16, it goes from -1000000"):
            nearest_codes(np.array([[-1e6, 1e6]]))


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=40, dim=64, hidden_dim=192, layers=2, heads=2)).eval()


class TestInTheModel:
    @pytest.mark.parametrize("act_order", [False, True])
    def test_a_packed_model_says_the_same_in_an_eighth_of_the_bytes(self, model, act_order):
        tokens = torch.randint(40, (4, 16))
        full = sum(layer.weight.nbytes for layer in surgery.linears(model).values())
        done = quantize_model(model, tokens, 4, group_size=32, act_order=act_order)
        with torch.no_grad():
            expected = model(tokens)
            use_packed(model, done)
            torch.testing.assert_close(model(tokens), expected, **tolerance(torch.float32, 64))
        packed = [module for module in model.modules() if isinstance(module, WeightOnlyLinear)]
        assert len(packed) == len(done) and sum(layer.packed.nbytes for layer in packed) == full // 8
        assert all((layer.order is None) != act_order or layer.group_size == 64 for layer in packed)

    @pytest.mark.parametrize(("group_size", "bits"), [(32, 4.75), (64, 4.375)])
    def test_run_rounds_the_model_and_reports_what_is_held(self, model, group_size, bits):
        parser = argparse.ArgumentParser()
        chapter.options(parser)
        before = copy.deepcopy(model)
        report = chapter.apply(model, torch.zeros(0, 16), parser.parse_args(["--group-size", str(group_size)]))
        assert report["bits per weight"] == bits
        for layer, old in zip(surgery.linears(model).values(), surgery.linears(before).values(), strict=True):
            expected = nearest_codes(old.weight.detach().numpy(), group_size).dequantize()
            np.testing.assert_array_equal(layer.weight.detach().numpy(), expected.astype(np.float32))

    def test_bits_are_counted_in_the_buffers(self, model):
        layer = WeightOnlyLinear(nearest_codes(np.ones((3, 96)), 32), torch.ones(3))
        assert stored_bits([layer, torch.nn.Linear(4, 4)]) == 4 + 24 / 32


def bench(model: Transformer, perplexities: list[float]) -> SimpleNamespace:
    """As much of a lab as the claim asks for; it measures the perplexities one after another."""
    measured = iter(perplexities)
    return SimpleNamespace(
        seeds=(0, 1),
        base_perplexity=20.0,
        model=lambda: copy.deepcopy(model),
        calibration=lambda seed, count: torch.randint(40, (count, 8), generator=torch.Generator().manual_seed(seed)),
        perplexity=lambda changed: next(measured),
    )


class TestClaim:
    def test_counts_the_bytes_of_the_formula(self, model):
        made = chapter.claim(bench(model, [21, 22, 23]))
        assert made.holds and "compute the same logits" in made.sentence
        assert made.numbers["bits, groups of 32"] == 4.75 and made.numbers["bits, groups of 64"] == 4.375
        widths = [layer.weight.shape for layer in surgery.linears(model).values()]
        whole = 4 + 24 * sum(rows for rows, _ in widths) / sum(rows * columns for rows, columns in widths)
        assert made.numbers["bits, whole rows"] == pytest.approx(whole)

    def test_does_not_hold_if_small_groups_do_not_pay(self, model):
        assert not chapter.claim(bench(model, [23, 22, 21])).holds

    def test_does_not_hold_if_the_packed_layers_compute_something_else(self, model, monkeypatch):
        monkeypatch.setattr(
            WeightOnlyLinear, "weight", lambda self: torch.ones(len(self.packed), 8 * self.packed.shape[1])
        )
        made = chapter.claim(bench(model, [21, 22, 23]))
        assert not made.holds and "compute other logits" in made.sentence

    def test_does_not_hold_if_more_is_held(self, model, monkeypatch):
        monkeypatch.setattr(chapter, "stored_bits", lambda layers: 5.0)
        assert not chapter.claim(bench(model, [21, 22, 23])).holds
