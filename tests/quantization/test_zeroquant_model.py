"""ZeroQuant in the model, its activations, and what the wrappers of its kernels refuse."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import zeroquant
from chapters.quantization.zeroquant import (
    dequantize,
    distill_layers,
    gelu_quantize,
    quantize,
    rounded,
    swiglu_quantize,
)
from minitfm import surgery
from tests.conftest import DEVICE, kernel
from tests.minitfm.models import tiny_model, tokens
from tests.quantization.token_grids import SIZES, near, toy_layers, values

kernels = kernel("quantization.zeroquant")


class TestActivations:
    @given(**SIZES)
    def test_codes_stand_for_those_of_torch(self, seed, rows, columns):
        gate, up = values(seed, rows, columns, np.float64), values(seed + 1, rows, columns, np.float64)
        near(*swiglu_quantize(gate, up), (F.silu(torch.from_numpy(gate)) * torch.from_numpy(up)).numpy())
        near(*gelu_quantize(gate), F.gelu(torch.from_numpy(gate)).numpy())

    def test_a_gate_far_below_zero_is_shut(self):
        codes, scale = swiglu_quantize(np.array([[-1e4, 1]], np.float32), np.ones((1, 2), np.float32))
        assert codes[0, 0] == 0 and scale > 0

    def test_refusals_name_what_is_wrong(self):
        with pytest.raises(ValueError, match="gate and up must have one shape"):
            swiglu_quantize(np.ones((2, 3)), np.ones((2, 4)))
        with pytest.raises(ValueError, match="gate must be finite"):
            swiglu_quantize(np.full((2, 3), np.nan), np.ones((2, 3)))
        with pytest.raises(ValueError, match=r"x must be \[tokens, dim\], got shape \(3,\)"):
            gelu_quantize(np.ones(3))


class TestModel:
    @given(**SIZES, bits=st.integers(2, 8))
    def test_rounded_has_the_values_of_the_codes_and_passes_every_gradient(self, seed, rows, columns, bits):
        x = torch.from_numpy(values(seed, rows, columns)).requires_grad_()
        found = rounded(x, bits, rows)
        codes, scale, zero = quantize(x.numpy(force=True), bits, rows)
        np.testing.assert_array_equal(found.numpy(force=True), dequantize(codes, scale, zero))
        found.backward(torch.full_like(found, 3.0))
        assert (x.grad == 3).all()
        torch.testing.assert_close(rounded(x), rounded(x, 8, rows), rtol=0, atol=0)

    @pytest.mark.parametrize("activation", ["swiglu", "relu"])
    def test_distillation_lowers_the_errors_of_all_layers(self, activation):
        text, teacher = tokens(8, 12), tiny_model(activation=activation)
        student = tiny_model(activation=activation)
        zeroquant.quantize_model(student, 3, 8)
        before = zeroquant.layer_errors(student, teacher, text)
        zeroquant.distill_model(student, teacher, text, 30, rate=1e-3)
        after = zeroquant.layer_errors(student, teacher, text)
        assert (after < before).all() and (after > 0).all()

    def test_measuring_the_errors_changes_nothing(self):
        model, text = tiny_model(), tokens(3, 8)
        zeroquant.quantize_model(model, 4, 16)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        zeroquant.layer_errors(model, tiny_model(), text)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_applied_it_is_a_plain_model_with_few_values_in_a_group(self):
        model, plain = tiny_model(), tiny_model()
        report = zeroquant.apply(model, tokens(4, 8), Namespace(bits=2, group_size=16, steps=2))
        assert report["bits per weight"] == 3 and model.state_dict().keys() == plain.state_dict().keys()
        for name, layer in surgery.linears(model).items():
            groups = layer.weight.detach().reshape(-1, 16)
            assert max(len(group.unique()) for group in groups) <= 4, name
        assert model(tokens(1, 5)).isfinite().all()

    def test_refusals_name_what_is_wrong(self):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 9"):
            zeroquant.quantize_model(tiny_model(), 9)
        with pytest.raises(ValueError, match="group_size must divide the weights of every layer, got 7"):
            zeroquant.quantize_model(tiny_model(), 4, 7)
        with pytest.raises(ValueError, match="groups must divide the 6 numbers of x, got 4"):
            quantize(np.ones(6), 4, 4)
        with pytest.raises(ValueError, match="as many layers as the teacher's 2"):
            distill_layers(toy_layers(1), toy_layers(2), [torch.ones(1, 3)], 1, 1e-3)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"x": torch.ones(6)}, ValueError, "x must be"),
        ({"x": torch.ones(2, 0), "weight": torch.ones(0)}, ValueError, "1 to 16384 columns, got 0"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must be \[6\]"),
        ({"residual": torch.ones(1, 6)}, ValueError, "residual must have the shape of x"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        ({"x": torch.ones(2, 6, dtype=torch.float64)}, TypeError, "x must have dtype"),
        ({"weight": torch.ones(6).half()}, TypeError, "x, weight must have one dtype"),
        ({"x": torch.ones(6, 2).T}, ValueError, "x must be contiguous"),
    ],
)
def test_the_wrapper_names_what_it_refuses(changed, error, complaint):
    with pytest.raises(error, match=complaint):
        kernels.rms_norm_quantize(**{"x": torch.ones(2, 6), "weight": torch.ones(6), "eps": 1e-5} | changed)


@pytest.mark.kernel
def test_the_activations_name_what_they_refuse():
    with pytest.raises(ValueError, match="gate and up must have one shape"):
        kernels.swiglu_quantize(torch.ones(2, 6), torch.ones(2, 5))
    with pytest.raises(TypeError, match="x must have dtype"):
        kernels.gelu_quantize(torch.ones(2, 6).int())


@pytest.mark.kernel
def test_no_token_is_no_work():
    nothing, weight = torch.ones(0, 6, device=DEVICE), torch.ones(6, device=DEVICE)
    assert kernels.rms_norm_quantize(nothing, weight, 1e-5)[0].shape == (0, 6)
    assert kernels.swiglu_quantize(nothing, nothing)[1].shape == (0,)
