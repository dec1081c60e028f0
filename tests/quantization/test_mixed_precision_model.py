"""Mixed precision in the model; layers of several widths in one buffer, bit by bit; what the kernel's wrapper says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from chapters.quantization import mixed_precision
from chapters.quantization.weight_only import nearest_codes
from chapters.shared.packed_layers import LANES, SPAN, dequantize_layers, pack_layers
from chapters.shared.static_inputs import GriddedLinear, activations, most_hurt, round_activations
from minitfm import evaluate, surgery
from tests.conftest import KERNEL_DTYPES, kernel, tolerance
from tests.minitfm.models import tiny_model, tokens
from tests.quantization.widths import GROUPS, SEEDS, drawn, on_device, weights_of

kernels = kernel("quantization.mixed_precision")


class TestModel:
    def test_products_are_differences_of_gradients(self):
        model, text = tiny_model().double(), tokens(2, 8)
        rng = np.random.default_rng(0)
        for name, product in list(mixed_precision.hessian_products(model, text).items())[::3]:
            weight, gradients = surgery.linears(model)[name].weight, []
            v = rng.standard_normal(weight.numel())
            for sign in (1, -1):
                moved = tiny_model().double()
                with torch.no_grad():
                    surgery.linears(moved)[name].weight += sign * 1e-5 * torch.from_numpy(v).view_as(weight)
                loss = F.cross_entropy(moved(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())  # nll is in float32
                (gradient,) = torch.autograd.grad(loss, surgery.linears(moved)[name].weight)
                gradients.append(gradient.flatten().numpy())
            expected = (gradients[0] - gradients[1]) / 2e-5
            np.testing.assert_allclose(product(v), expected, **tolerance(np.float32, scale=np.abs(expected).max()))

    @pytest.mark.parametrize("how", mixed_precision.SENSITIVITIES)
    def test_each_layer_has_a_sensitivity(self, how):
        found = mixed_precision.layer_sensitivity(tiny_model(), tokens(4, 8), how)
        assert found.shape == (14,) and (found >= 0).all() and found.max() > 0
        assert how != "error" or (found == 1).all()

    def test_a_filled_model_has_the_rounded_weights(self):
        model = tiny_model()
        bits = np.resize([2, 3, 4, 8], 14)
        expected = [
            nearest_codes(layer.weight.numpy(force=True), 8, int(width)).dequantize()
            for layer, width in zip(surgery.linears(model).values(), bits, strict=True)
        ]
        mixed_precision.fill_model(model, mixed_precision.pack_model(model, bits, 8))
        for layer, values in zip(surgery.linears(model).values(), expected, strict=True):
            np.testing.assert_allclose(layer.weight.numpy(force=True), values, **tolerance(np.float32))

    def test_errors_fall_with_the_bits(self):
        errors = mixed_precision.rounding_errors(tiny_model(), (2, 3, 4, 8), 8)
        assert errors.shape == (14, 4) and (np.diff(errors, axis=1) < 0).all()


class TestInputs:
    def test_a_gridded_input_is_what_the_grid_leaves(self):
        linear, x = torch.nn.Linear(6, 3), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        scale = 3.5 / 15
        codes = (torch.round(x / scale) + round(1.5 / scale)).clamp(0, 15)
        expected = linear((codes - round(1.5 / scale)) * scale)
        torch.testing.assert_close(GriddedLinear(linear, -1.5, 2.0, 4)(x), expected, **tolerance(torch.float32, 6))

    def test_tensors_that_layers_share_are_counted_once(self):
        model, text = tiny_model(), tokens(3, 8)
        found = activations(model, text)
        assert sorted(name for names, *_ in found for name in names) == sorted(surgery.linears(model))
        assert len(found) == 8
        for name, x in surgery.record_inputs(model, text, list(surgery.linears(model))):
            low, high = next((low, high) for names, low, high in found if name in names)
            assert (low, high) == (x.min().item(), x.max().item())

    def test_those_hurt_most_come_first(self):
        model, text = tiny_model(), tokens(4, 16)
        found = activations(model, text)
        losses = [evaluate.mean_nll(round_activations(tiny_model(), [found[at]], [8]), text) for at in range(8)]
        order = most_hurt(model, found, text)
        assert sorted(order) == list(range(8)) and [losses[at] for at in order] == sorted(losses, reverse=True)

    def test_one_wide_tensor_in_16_bits_saves_the_rest_in_8(self):
        model, text = tiny_model(), tokens(4, 16)
        readers = ["blocks.1.feed_forward.gate_proj", "blocks.1.feed_forward.up_proj"]
        with torch.no_grad():  # an outlier channel
            model.blocks[1].feed_forward_norm.weight[3] *= 64
            for name in readers:
                surgery.linears(model)[name].weight[:, 3] /= 64
        plain, names = model(text), set(model.state_dict())
        found, errors = activations(model, text), []
        for wide in ([], [readers], [each.readers for each in found]):
            widths = [16 if each.readers in wide else 8 for each in found]
            errors.append((round_activations(model, found, widths)(text) - plain).abs().mean().item())
        assert errors[0] > 3 * errors[1] > 30 * errors[2] and set(model.state_dict()) == names


class TestLayout:
    @given(SEEDS, st.integers(1, 8))
    def test_each_bit_has_its_place(self, seed, bits):
        (layer,) = drawn(seed, [bits], 8)
        stream = np.unpackbits(pack_layers([layer]).packed.view(np.uint8), bitorder="little")
        rng = np.random.default_rng(seed)
        for at in {0, layer.codes.size - 1, *rng.integers(layer.codes.size, size=200).tolist()}:
            span, octet = divmod(at // 8, SPAN // 8)
            lane, first = octet % LANES, bits * (8 * (octet // LANES) + at % 8)
            for bit in range(bits):
                quad, place = divmod(first + bit, 128)
                found = stream[128 * (LANES * (span * bits + quad) + lane) + place]
                assert found == layer.codes.ravel()[at] >> bit & 1

    @given(SEEDS, st.lists(st.integers(1, 8), min_size=1, max_size=4), GROUPS)
    def test_expands_to_the_weights(self, seed, bits, group):
        layers = drawn(seed, bits, group)
        held = pack_layers(layers)
        assert held.packed.dtype == np.int32 and held.table.shape == (len(bits) + 1, 4)
        np.testing.assert_array_equal(held.table[:-1, 3], bits)
        np.testing.assert_array_equal(dequantize_layers(*held), weights_of(layers))

    def test_refuses_what_does_not_fit(self):
        held = pack_layers(drawn(0, [2, 3], 8))
        with pytest.raises(ValueError, match="share one group size, a multiple of 8"):
            pack_layers(drawn(0, [2], 8) + drawn(0, [2], 16))
        for changed in ({"packed": held.packed[:-1]}, {"scale": held.scale[1:]}, {"group_size": 16}):
            with pytest.raises(ValueError, match="table ends with"):
                dequantize_layers(*held._replace(**changed))


@pytest.mark.kernel
@pytest.mark.parametrize("scale", KERNEL_DTYPES)
def test_scales_may_have_any_dtype_which_the_weights_take(scale):
    layers = drawn(0, [3, 2], 8)
    found = kernels.dequantize_layers(*on_device(pack_layers(layers), scale).values(), 8)
    assert found.dtype is scale
    np.testing.assert_allclose(found.double().cpu().numpy(), weights_of(layers), **tolerance(scale))


@pytest.mark.kernel
def test_the_peer_in_torch_is_right_too():
    layers = drawn(3, [2, 3, 4, 8], 8)
    found = kernels.by_torch(*on_device(pack_layers(layers), torch.float32).values(), 8)
    np.testing.assert_allclose(found.cpu().numpy(), weights_of(layers), **tolerance(np.float32))
    sizes = [layer.codes.size for layer in layers]
    np.testing.assert_array_equal(kernels.make_table(sizes, [2, 3, 4, 8]).numpy(), pack_layers(layers).table)


def other_table(row: int, column: int, value: int) -> torch.Tensor:
    table = on_device(pack_layers(drawn(0, [2, 3], 8)))["table"].clone()
    table[row, column] = value
    return table


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"table": torch.zeros(1, 4, dtype=torch.int64)}, ValueError, r"table must be \[layers \+ 1, 4\]"),
        ({"table": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "table must have dtype"),
        ({"table": other_table(0, 3, 5)}, ValueError, "bits of layer 0 must be one of"),
        ({"table": other_table(1, 0, 9)}, ValueError, "layer 0 does not have whole groups of 8"),
        ({"table": other_table(2, 1, 9)}, ValueError, "layer 1 does not have whole groups of 8"),
        ({"table": other_table(1, 2, 0)}, ValueError, "layer 0 does not have whole groups of 8"),
        ({"group_size": 12}, ValueError, "group_size must be a multiple of 8, got 12"),
        ({"packed": torch.zeros(8, dtype=torch.int32)}, ValueError, "packed must have the"),
        ({"zero": torch.zeros(1, dtype=torch.uint8)}, ValueError, "scale and zero must have"),
        ({"dtype": torch.float64}, ValueError, "dtype must be a float of 16 or 32 bits"),
    ],
)
def test_the_wrapper_names_what_it_refuses(changed, error, complaint):
    given_ = on_device(pack_layers(drawn(0, [2, 3], 8))) | {"group_size": 8} | changed
    with pytest.raises(error, match=complaint):
        kernels.dequantize_layers(**given_)


@pytest.mark.kernel
def test_cases_count_the_bytes_of_their_tensors():
    for case in kernels.CASES:
        packed, table, scale, zero, _ = case.inputs(torch.device("cpu"))
        moved = packed.nbytes + scale.nbytes + zero.nbytes + 2 * 8 * int(table[-1, 2])
        assert moved == case.bytes
