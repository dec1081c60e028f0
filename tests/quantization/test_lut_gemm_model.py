"""Around LUT-GEMM: uniform grids as planes, the layer that holds them, what they do to a model, and what is refused."""

from __future__ import annotations

import argparse
import copy
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import lut_gemm as chapter
from chapters.quantization.gptq import round_to_nearest
from chapters.quantization.lut_gemm import BinaryCoded, BinaryLinear, alternating, from_uniform, greedy, refine
from chapters.quantization.weight_only import Quantized
from minitfm import surgery
from minitfm.config import Config
from minitfm.model import Transformer
from tests.conftest import DEVICE, golden, kernel, tolerance
from tests.quantization.problems import layers

kernels = kernel("quantization.lut_gemm")


class TestFromUniform:
    @given(layers(columns=(6, 12)), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([None, 2, 3]), st.booleans())
    def test_stands_for_the_same_values(self, layer, bits, size, symmetric):
        grid = round_to_nearest(layer.weight, bits, size, symmetric)
        found, expected = from_uniform(grid), grid.dequantize()
        largest = float(np.abs(grid.scale).max() * 2**bits)
        np.testing.assert_allclose(found.dequantize(), expected, **tolerance(float, bits, largest))
        assert (np.diff(found.alpha) <= 0).all() and (np.abs(found.signs) == 1).all()

    def test_equals_the_released_code_with_the_planes_in_reverse(self):
        arrays = {name.split("/")[1]: held for name, held in golden("quant/bcq").items() if name.startswith("uniform")}
        grid = Quantized(
            arrays["codes"].reshape(32, 128),
            *(arrays[name][..., 0].astype(float) for name in ("scale", "zero")),
            group_of_column=np.arange(128) // 32,
            bits=3,
        )
        found = from_uniform(grid)
        np.testing.assert_array_equal(found.alpha[..., ::-1], arrays["alpha"])
        np.testing.assert_allclose(found.offset, arrays["offset"][..., 0], **tolerance(np.float32))
        np.testing.assert_allclose(found.dequantize()[:4], arrays["deq"], **tolerance(np.float32))

    def test_refined_it_never_gets_worse(self):
        weight = np.random.default_rng(0).standard_normal((8, 64))
        coded = from_uniform(round_to_nearest(weight, 4, 32))
        errors = [np.square(coded.dequantize() - weight).sum()]
        for _ in range(6):
            coded = refine(weight, coded)
            errors.append(np.square(coded.dequantize() - weight).sum())
        assert (np.diff(errors) <= 0).all() and errors[-1] < 0.9 * errors[0]

    def test_refuses_groups_of_scattered_columns(self):
        grid = Quantized(np.zeros((1, 4), np.uint8), np.ones((1, 2)), np.zeros((1, 2)), np.array([0, 1, 0, 1]), 2)
        with pytest.raises(ValueError, match="groups must be runs of neighbouring columns"):
            from_uniform(grid)


class TestAlternating:
    def test_goes_through_every_round(self):
        weight = np.random.default_rng(0).standard_normal((4, 32))
        states = list(chapter.rounds_of(weight, 3, 16, 5))
        assert len(states) == 6
        for before, after in pairwise(states):
            np.testing.assert_array_equal(after.alpha, refine(weight, before).alpha)
        np.testing.assert_array_equal(states[0].signs, greedy(weight, 3, 16).signs)
        np.testing.assert_array_equal(states[5].signs, alternating(weight, 3, 16, 5).signs)

    def test_one_plane_is_already_the_best(self):
        weight = np.random.default_rng(0).standard_normal((4, 32))
        found, best = alternating(weight, 1, 16), np.abs(weight).reshape(4, 2, 16).mean(axis=-1)
        np.testing.assert_allclose(found.alpha[..., 0], best)

    def test_values_on_a_few_levels_are_found_exactly(self):
        signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1)
        weight = np.array([[4.0, 2.0, 0.9]]) @ signs
        found = alternating(weight, 3, rounds=50)
        np.testing.assert_allclose(found.dequantize(), weight, atol=1e-9)

    @pytest.mark.parametrize(
        ("wrong", "complaint"),
        [
            ({"bits": 0}, "bits must be an integer from 1 to 8, got 0"),
            ({"group_size": 3}, "group_size must divide the 4 columns of weight, got 3"),
            ({"rounds": -1}, "rounds must be 0 or more, got -1"),
            ({"weight": np.full((1, 4), np.inf)}, "weight must be finite"),
        ],
    )
    def test_bad_arguments_are_named(self, wrong, complaint):
        with pytest.raises(ValueError, match=complaint):
            alternating(**({"weight": np.eye(4), "bits": 2} | wrong))


class TestLayer:
    @given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.sampled_from([None, 32]), st.booleans())
    def test_computes_what_the_dequantized_weights_do(self, seed, bits, group_size, uniform):
        rng = np.random.default_rng(seed)
        x, weight, bias = rng.standard_normal((6, 64)), rng.standard_normal((5, 64)), torch.from_numpy(rng.random(5))
        coded = (
            from_uniform(round_to_nearest(weight, bits, group_size)) if uniform else greedy(weight, bits, group_size)
        )
        layer = BinaryLinear(coded, bias, torch.float64)
        found = layer(torch.from_numpy(x).unflatten(0, (2, 3)))
        expected = (x @ coded.dequantize().T + bias.numpy()).reshape(2, 3, 5)
        np.testing.assert_allclose(found.numpy(), expected, **tolerance(np.float64, 64, 10))
        assert (layer.offset is None) != uniform

    @pytest.mark.kernel  # on a GPU it is called, for one row
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(1, 1, 64), (2, 3, 64), (64,)])
    def test_serves_every_precision_and_shape(self, dtype, shape):
        rng = np.random.default_rng(0)
        layer = BinaryLinear(greedy(rng.standard_normal((6, 64)), 3, 32), torch.ones(6)).to(DEVICE)
        x = torch.from_numpy(rng.standard_normal(shape)).to(DEVICE, dtype)
        found, expected = layer(x), x.double().cpu() @ layer.weight().double().cpu().T + 1
        assert found.dtype is dtype
        np.testing.assert_allclose(found.double().cpu(), expected, **tolerance(dtype, 64))

    def test_passes_gradients_to_its_input(self):
        layer = BinaryLinear(greedy(np.random.default_rng(0).standard_normal((6, 64)), 2, 32)).to(DEVICE)
        x = torch.randn(1, 64, device=DEVICE, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(gradient[0], layer.weight().sum(0))

    def test_refuses_what_it_cannot_hold(self):
        with pytest.raises(ValueError, match="groups must be a multiple of 32 columns, got 16"):
            BinaryLinear(greedy(np.ones((1, 64)), 2, 16))
        with pytest.raises(ValueError, match=r"scales must be finite in torch.float16, got up to 1e\+06"):
            BinaryLinear(greedy(np.full((1, 64), 1e6), 2))


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=40, dim=64, hidden_dim=192, layers=2, heads=2)).eval()


class TestInTheModel:
    def test_weights_become_what_the_layers_compute_with(self, model):
        before, tokens = copy.deepcopy(model), torch.randint(40, (2, 9))
        held = chapter.quantize_model(model, 2, 64)
        for name, layer in surgery.linears(model).items():
            coded = alternating(surgery.linears(before)[name].weight.detach().numpy(), 2, 64)
            torch.testing.assert_close(layer.weight, held[name].weight(), rtol=0, atol=0)
            np.testing.assert_allclose(layer.weight.detach(), coded.dequantize(), rtol=1e-2, atol=1e-4)
        with torch.no_grad():
            expected = model(tokens)
            for name, layer in held.items():
                surgery.replace(model, name, layer)
            torch.testing.assert_close(model(tokens), expected)

    @pytest.mark.parametrize(("group_size", "bits"), [(32, 3), (64, 2)])
    def test_run_quantizes_the_model_and_reports_what_is_held(self, model, group_size, bits):
        parser = argparse.ArgumentParser()
        chapter.options(parser)
        args = parser.parse_args(["--bits", str(bits), "--group-size", str(group_size), "--rounds", "1"])
        expected = chapter.quantize_model(copy.deepcopy(model), bits, group_size, 1)
        report = chapter.apply(model, torch.zeros(0, 16), args)
        assert report["bits per weight"] == bits * (1 + 16 / group_size)
        for name, layer in surgery.linears(model).items():
            torch.testing.assert_close(layer.weight, expected[name].weight(), rtol=0, atol=0)

    def test_rows_of_padding_and_offsets_are_counted(self):
        weight = np.random.default_rng(0).standard_normal((5, 32))
        held = BinaryLinear(from_uniform(round_to_nearest(weight, 2, 32)))
        assert chapter.stored_bits([held]) == 2 * 8 / 5 + 16 * 3 / 32


def bench(model: Transformer, perplexities: list[float]) -> SimpleNamespace:
    """As much of a lab as the claim asks for; it measures the perplexities one after another."""
    measured = iter(perplexities)
    return SimpleNamespace(
        base_perplexity=20.0,
        weights={name: value.detach() for name, value in model.state_dict().items()},
        model=lambda: copy.deepcopy(model),
        perplexity=lambda changed: next(measured),
    )


class TestClaim:
    @pytest.fixture
    def model(self, monkeypatch) -> Transformer:
        """Small, and refined in two rounds: fifteen take seconds."""
        monkeypatch.setattr(chapter, "ROUNDS", 2)
        torch.manual_seed(0)
        return Transformer(Config(vocab_size=40, dim=32, hidden_dim=64, layers=1, heads=2)).eval()

    def test_compares_at_each_width(self, model):
        made = chapter.claim(bench(model, [33.0, 34, 30, 24.0, 25, 23, 21.0, 23, 22]))
        assert made.holds and "beat greedy at 2, 3, 4 bits and a uniform grid at 2 bits" in made.sentence
        assert "by 2 bits 13.00, 14.00, 10.00; 3 bits" in made.sentence
        assert made.numbers["rise, greedy, 4 bits"] == 3
        for bits in (2, 3, 4):
            assert made.numbers[f"error, alternating, {bits} bits"] < made.numbers[f"error, greedy, {bits} bits"]

    def test_errors_are_those_of_the_weights(self, model):
        made, total, lost = chapter.claim(bench(model, [21.0] * 9)), 0.0, 0.0
        for layer in surgery.linears(model).values():
            weight = layer.weight.detach().double().numpy()
            lost += np.square(greedy(weight, 3, 32).dequantize() - weight).sum()
            total += np.square(weight).sum()
        assert made.numbers["error, greedy, 3 bits"] == pytest.approx(lost / total)
        assert not made.holds and "beat greedy at no bits" in made.sentence

    @pytest.mark.parametrize("worse", [1, 4, 7, 0])
    def test_does_not_hold_if_greedy_is_better_once_or_a_uniform_grid_at_two_bits(self, model, worse):
        measured = [33.0, 34, 30, 24.0, 25, 23, 21.0, 23, 22]
        measured[worse] = 20.5
        assert not chapter.claim(bench(model, measured)).holds


def arguments(**changed) -> dict:
    """Fitting arguments of the kernel, but for what is changed."""
    given_ = {"x": torch.ones(1, 64), "packed": torch.zeros(2, 1, 2, 4, dtype=torch.int32), "group_size": 32}
    return given_ | {"alpha": torch.ones(3, 2, 2), "offset": torch.ones(3, 2)} | changed


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"x": torch.ones(2, 64)}, ValueError, r"x must be one row \[1, K\], got \(2, 64\)"),
        ({"x": torch.ones(1, 96)}, ValueError, "and K=96 in 2 groups of it, got 32"),
        ({"alpha": torch.ones(3, 2)}, ValueError, r"alpha must be \[N, groups, planes\], got \(3, 2\)"),
        ({"alpha": torch.ones(0, 2, 2)}, ValueError, "alpha must be"),
        ({"group_size": 16}, ValueError, "group_size must be a multiple of 32"),
        ({"group_size": 0}, ValueError, "got 0"),
        ({"packed": torch.zeros(2, 2, 2, 4, dtype=torch.int32)}, ValueError, r"packed must be \(2, 1, 2, 4\)"),
        ({"packed": torch.zeros(2, 1, 2, 4)}, TypeError, "packed must have dtype torch.int32"),
        ({"offset": torch.ones(3, 1)}, ValueError, r"offset must be \(3, 2\), got \(3, 1\)"),
        ({"offset": torch.ones(3, 2).double()}, TypeError, "offset must have dtype"),
        ({"x": torch.ones(1, 64).double()}, TypeError, "x must have dtype"),
        ({"alpha": torch.ones(2, 2, 3).permute(2, 0, 1)}, ValueError, "alpha must be contiguous"),
    ],
)
def test_the_wrapper_names_what_it_refuses(changed, error, complaint):
    with pytest.raises(error, match=complaint):
        kernels.lut_gemm(**arguments(**changed))


def test_the_reference_says_what_does_not_fit():
    x, packed, alpha = np.ones((1, 64)), np.zeros((2, 1, 2, 4), np.int32), np.ones((3, 2, 2))
    for given_, complaint in (
        ((x[:, :32], packed, alpha, None, 32), r"x \(1, 32\), packed \(2, 1, 2, 4\), .* do not fit"),
        ((x, packed, alpha, np.ones((3, 1)), 32), r"offset must be \[out, groups\] = \(3, 2\), got \(3, 1\)"),
        ((x, packed.astype(np.int64), alpha, None, 32), "packed must be int32 .*, got int64"),
    ):
        with pytest.raises(ValueError, match=complaint):
            chapter.lut_gemm(*given_)
    with pytest.raises(ValueError, match=r"weight must be \[out, in\] = \(3, 64\) like coded, got \(3, 32\)"):
        refine(np.ones((3, 32)), BinaryCoded(np.ones((3, 64, 2), np.int8), alpha, np.zeros((3, 2))))


def test_plain_torch_expands_alike():
    rng = np.random.default_rng(0)
    layer = BinaryLinear(from_uniform(round_to_nearest(rng.standard_normal((5, 64)), 3, 32)))
    assert layer.offset is not None
    found = (
        kernels.dequantize(layer.packed, layer.alpha, layer.offset, 32, torch.float32) if kernels else layer.weight()
    )
    torch.testing.assert_close(found, layer.weight())
